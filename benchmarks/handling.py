"""Importing, attaching, loading, switching and merging adapters, beside HF PEFT doing the same.

The base has Llama's shape with 0.83B parameters in bf16 (hidden 2048, 16 layers, 112 linear layers, a small vocabulary);
the adapter is LoRA of rank 16 on all 112, 40 MB in fp32. Both tools hold a model of their own over the same weights.
Seconds are CPU seconds of one thread. Each of the 50 loads is done once by each tool, in turn.

    python benchmarks/handling.py [--adapters 50] [--rounds 5]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Spread, cpu_seconds, interleaved, llama, one_thread, peak_extra_bytes, save
from torch import nn

import smidgen

RANK, ALPHA = 16, 32.0
ATTACH_LIMIT_S, LOAD_LIMIT_S, SWITCH_LIMIT_S = 0.15, 3.0, 0.002
OURS, THEIRS = "smidgen", "HF PEFT"
SHOWN_LOADS = (1, 10, 25, 50)


def import_seconds(rounds: int) -> dict[str, Spread]:
    """CPU seconds that an import takes in a new process, over those that torch alone takes."""

    def imports(package: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {package}"], check=True)

    def of_children(run: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    samples = interleaved({p: imports(p) for p in ("torch", "smidgen", "peft")}, rounds, of_children)
    return {
        tool: Spread.of([a - b for a, b in zip(samples[package], samples["torch"], strict=True)])
        for tool, package in ((OURS, "smidgen"), (THEIRS, "peft"))
    }


def twins() -> tuple[nn.Module, nn.Module]:
    """Two models over the same weights: no tool sees what the other puts on, and memory is taken once."""
    one, other = (llama_1b(device) for device in ("cpu", "meta"))
    other.load_state_dict(one.state_dict(), assign=True)
    return one, other


def llama_1b(device: str) -> nn.Module:
    return llama(hidden=2048, layers=16, feed_forward=5632, heads=32, dtype=torch.bfloat16, device=device)


def hf_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")


def hf_peft(model: nn.Module) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(model, hf_config())


def make_real(model: nn.Module) -> None:
    """Give every trainable tensor numbers that a training could have left."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.06)


def attaching(ours: nn.Module, theirs: nn.Module, rounds: int) -> dict[str, Spread]:
    def attach() -> None:
        smidgen.attach(ours, smidgen.LoRA(rank=RANK, alpha=ALPHA))

    samples: dict[str, list[float]] = {OURS: [], THEIRS: []}
    wrapped: list[Any] = []

    def measure(run: Callable[[], object]) -> float:
        seconds = cpu_seconds(run)
        if wrapped:
            wrapped.pop().unload()
        if (adapters := smidgen.adapters_of(ours)) is not None:
            adapters.detach()
        return seconds

    variants = {OURS: attach, THEIRS: lambda: wrapped.append(hf_peft(theirs))}
    samples = interleaved(variants, rounds, measure, warm_up=False)
    return {tool: Spread.of(seconds) for tool, seconds in samples.items()}


def loading(ours: nn.Module, theirs: nn.Module, count: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of every load by each tool, of adapters named "0", "1", ..., and HF PEFT's model with all of them."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = smidgen.attach(ours, smidgen.LoRA(rank=RANK, alpha=ALPHA))
        make_real(ours)
        adapters.save(Path(folder) / "ours")
        adapters.detach()
        wrapped = hf_peft(theirs)
        make_real(wrapped)
        wrapped.save_pretrained(f"{folder}/theirs")
        wrapped.unload()
        numbers = {OURS: iter(range(count)), THEIRS: iter(range(count))}

        from peft import PeftModel

        holder: list[PeftModel] = []

        def load_theirs() -> None:
            name = str(next(numbers[THEIRS]))
            if holder:
                holder[0].load_adapter(f"{folder}/theirs", adapter_name=name)
            else:
                holder.append(PeftModel.from_pretrained(theirs, f"{folder}/theirs", adapter_name=name))

        variants = {
            OURS: lambda: smidgen.load(ours, Path(folder) / "ours", str(next(numbers[OURS]))),
            THEIRS: load_theirs,
        }
        return interleaved(variants, count, warm_up=False), holder[0]


def switching(ours: nn.Module, wrapped: Any, count: int) -> dict[str, dict[str, Spread]]:
    """Seconds to switch to another adapter, and to switch adapters off and on again."""
    adapters = smidgen.adapters_of(ours)
    assert adapters is not None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    turns = {OURS: iter(order), THEIRS: iter(order)}

    def off_and_on() -> None:
        active = adapters.active
        adapters.activate(None)
        adapters.activate(active)

    def theirs_off_and_on() -> None:
        with wrapped.disable_adapter():
            pass

    switches = {
        OURS: lambda: adapters.activate(str(next(turns[OURS]))),
        THEIRS: lambda: wrapped.set_adapter(str(next(turns[THEIRS]))),
    }
    return {
        what: {tool: Spread.of(seconds) for tool, seconds in interleaved(variants, rounds, warm_up=False).items()}
        for what, variants, rounds in (
            ("switch", switches, min(count, 20)),
            ("off and on", {OURS: off_and_on, THEIRS: theirs_off_and_on}, 5),
        )
    }


def merging(ours: nn.Module, theirs: nn.Module, rounds: int) -> dict[str, dict[str, Spread]]:
    """Seconds and extra memory to write one adapter into the weights."""
    extra: list[float] = []

    def measure(run: Callable[[], Any]) -> float:
        merge = run()
        seconds = []
        extra.append(peak_extra_bytes(lambda: seconds.append(cpu_seconds(merge))) or float("nan"))
        return seconds[0]

    def prepare_ours() -> Callable[[], object]:
        adapters = smidgen.attach(ours, smidgen.LoRA(rank=RANK, alpha=ALPHA))
        make_real(ours)
        return adapters.merge

    def prepare_theirs() -> Callable[[], object]:
        wrapped = hf_peft(theirs)
        make_real(wrapped)
        return wrapped.merge_and_unload

    memory: dict[str, list[float]] = {OURS: [], THEIRS: []}

    def noting(tool: str, prepare: Callable[[], Callable[[], object]]) -> Callable[[], Callable[[], object]]:
        def run() -> Callable[[], object]:
            merge = prepare()
            return lambda: memory[tool].append(peak_extra_bytes(merge) or float("nan"))

        return run

    del extra, measure
    samples = interleaved(
        {OURS: noting(OURS, prepare_ours), THEIRS: noting(THEIRS, prepare_theirs)},
        rounds,
        lambda prepare: cpu_seconds(prepare()),  # type: ignore[arg-type]
        warm_up=False,
    )
    return {
        "seconds": {tool: Spread.of(seconds) for tool, seconds in samples.items()},
        "memory": {tool: Spread.of(sizes) for tool, sizes in memory.items()},
    }
