"""What the benchmarks share: interleaved timing, memory kept for backward, models of a shape, and results as JSON.

The machines they run on are shared and differ, so absolute times say little. What is compared runs in one process on
one thread, in rounds that run everything once in random order; CPU time of the process and wall time are taken of the
same run, and the ratio is formed inside each round. Reported are the median and the quartiles over rounds by CPU time,
which other work on the machine disturbs least, and the median by wall time.
"""

import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import report
import torch
from torch import nn

from smidgen.training.memory import kept_for_backward as kept_for_backward

RESULTS = Path(__file__).parent / "results"
Run = Callable[[], Any]
Figure = TypeVar("Figure")


@dataclass(frozen=True)
class Spread:
    """A figure over several rounds: median, lower and upper quartile."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> "Spread":
        low, middle, high = (
            statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
        )
        return Spread(middle, low, high, len(samples))

    def over(self, unit: float) -> "Spread":
        """The same figures in another unit."""
        return Spread(self.median / unit, self.low / unit, self.high / unit, self.rounds)


def one_thread() -> None:
    """Fix what would make two runs differ."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Seconds:
    """CPU time of the process and wall time: what a run took, or a moment."""

    cpu: float
    wall: float

    @staticmethod
    def now() -> "Seconds":
        return Seconds(time.process_time(), time.perf_counter())

    def __sub__(self, earlier: "Seconds") -> "Seconds":
        return Seconds(self.cpu - earlier.cpu, self.wall - earlier.wall)


def seconds_of(run: Run) -> Seconds:
    """What one run takes, garbage collection kept out of it."""
    gc.collect()
    gc.disable()
    try:
        start = Seconds.now()
        run()
        return Seconds.now() - start
    finally:
        gc.enable()


def cpu_seconds(run: Run) -> float:
    """CPU time of one run alone."""
    return seconds_of(run).cpu


@dataclass(frozen=True)
class Times:
    """Seconds of every variant and round by both clocks."""

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]


def timed(
    variants: Mapping[str, Run], rounds: int, measure: Callable[[Run], Seconds] = seconds_of, *, warm_up: bool = True
) -> Times:
    """`interleaved`, in seconds by both clocks."""
    samples = interleaved(variants, rounds, measure, warm_up=warm_up)
    return Times(
        cpu={name: [each.cpu for each in taken] for name, taken in samples.items()},
        wall={name: [each.wall for each in taken] for name, taken in samples.items()},
    )


def interleaved(
    variants: Mapping[str, Run], rounds: int, measure: Callable[[Run], Figure], *, warm_up: bool = True
) -> dict[str, list[Figure]]:
    """One figure per variant and round; every round runs all variants once, in random order."""
    order, shuffle = list(variants), random.Random(0).shuffle
    samples: dict[str, list[Figure]] = {name: [] for name in variants}
    for run in variants.values() if warm_up else ():
        measure(run)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(measure(variants[name]))
    return samples


def over(samples: Mapping[str, Sequence[float]], floor: str) -> dict[str, Spread]:
    """Each variant's figure over the floor's of the same round."""
    return {
        name: Spread.of([a / b for a, b in zip(figures, samples[floor], strict=True)])
        for name, figures in samples.items()
    }


def peak_extra_bytes(run: Run) -> float:
    """Resident memory at its highest during the run over that at its start.  Linux only; elsewhere not a number."""
    gc.collect()
    if platform.system() != "Linux":
        run()
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not given back would hide what the run takes
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark again
    before = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - before)


def peak_of_step(model: nn.Module, step: Run) -> float:
    """`peak_extra_bytes` of a training step from a model without gradients: those it makes count."""
    step()  # what is made once and stays
    model.zero_grad(set_to_none=True)
    return peak_extra_bytes(step)


def _resident(field: str) -> float:
    return next(float(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(field + ":"))


def llama(
    hidden: int, layers: int, feed_forward: int, heads: int, dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """A Llama of this shape with random weights and a small vocabulary; the other layers repeat the first.

    On the meta device it has no weights, for others to be assigned.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    if device == "meta":
        return cast(nn.Module, model)
    model.to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # to_empty lost its buffers, which no state dict holds
    blocks = model.model.layers
    with torch.no_grad():
        for outside in (model.model.embed_tokens, model.model.norm, model.lm_head, blocks[0]):
            for parameter in outside.parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
        for block in blocks[1:]:
            for parameter, first in zip(block.parameters(), blocks[0].parameters(), strict=True):
                parameter.copy_(first)
    return cast(nn.Module, model)


def save(name: str, title: str, text: str, tables: list[dict[str, Any]], claims: list[dict[str, Any]]) -> None:
    """Write `results/<name>.json` and make the page of all results anew.

    tables: title, columns, rows of texts, numbers and spreads.   claims: what was claimed, the limit, the figure.
    """
    result = {
        "title": title,
        "text": text,
        "machine": _machine(),
        "run": {"command": _command(), "date": datetime.now(UTC).date().isoformat()},
        "versions": {package: version(package) for package in packages()},
        "tables": tables,
        "claims": claims,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(plain(result), indent=1) + "\n")
    report.main()


def plain(data: Any) -> Any:
    """The same as JSON data: spreads become mappings."""
    return json.loads(json.dumps(data, default=asdict))


def described(doc: str | None) -> str:
    """What a benchmark's docstring says, without its command."""
    return (doc or "").partition("\n\n    ")[0]


def packages() -> list[str]:
    """What the figures depend on: always these, and what quantises where it was imported."""
    return ["smidgen", "torch", "transformers", "peft", *(p for p in ("bitsandbytes", "torchao") if p in sys.modules)]


def _command() -> str:
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _machine() -> dict[str, Any]:
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ": unknown")
    memory = next((line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), ": 0 kB")
    return {
        "processor": cpu.split(":")[1].strip(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory.split()[1]) / 2**20),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
