"""The benchmarks for GPUs run on the smallest shapes; no result is written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "benchmarks"
LENGTH = 1024  # at which what is kept for backward outweighs the optimiser's states


@pytest.fixture
def modules() -> tuple[Any, Any]:
    """`gpu` and `gpu_memory`."""
    import gpu
    import gpu_memory

    return gpu, gpu_memory


def test_every_variant_takes_a_step(modules):
    gpu, _ = modules
    said = ["--device", "cpu", "--shapes", "tiny", "tiny-nf4", "--sequences", "32", "--steps", "1", "--rounds", "1"]
    # a process of its own: Liger's kernels, where they are installed, stay in transformers
    done = subprocess.run([sys.executable, FOLDER / "gpu.py", *said], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("tiny", "tiny-nf4"):
        for variant in gpu.variants(gpu.SHAPES[name]):
            assert f"\n{name}  32  {variant}  " in f"\n{done.stdout}", done.stdout
    assert "out of memory" not in done.stdout


# HF PEFT asks transformers by a name that ends with version 6
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_memory_is_counted_and_recomputing_takes_less(modules):
    gpu, gpu_memory = modules
    beside = {}
    for name in ("tiny", "tiny-nf4"):
        variants = gpu.variants(gpu.SHAPES[name])
        for variant in ("HF PEFT as it comes", *(f"smidgen, recompute {level}" for level in ("off", "cheap", "all"))):
            if name == "tiny" or variant.startswith("smidgen"):
                held, peak = gpu_memory.counted(gpu.SHAPES[name], variants[variant][1], LENGTH)
                beside[name, variant] = peak - held
        ours = [beside[name, f"smidgen, recompute {level}"] for level in ("all", "cheap", "off")]
        assert ours == sorted(set(ours))
    assert beside["tiny", "smidgen, recompute off"] < beside["tiny", "HF PEFT as it comes"]


def test_what_is_counted_is_what_the_allocator_gives(modules):
    gpu, gpu_memory = modules
    shape = gpu.SHAPES["tiny"]
    _, dressed = gpu.variants(shape)["smidgen, recompute off"]
    with torch.random.fork_rng(devices=[]):
        held, peak = gpu_memory.counted(shape, dressed, LENGTH)
        assert gpu_memory.allocated(shape, dressed, LENGTH) == pytest.approx(peak - held, rel=0.3)
