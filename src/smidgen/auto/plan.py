"""The plan: every setting of a run that nobody said, filled in, with the reason.

What is said stands.  What is not is chosen from the preset of the method, the data, and a measurement of
milliseconds on this machine: which precision is faster here, and how long a step takes, so that a run ends when it
should.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from ..core.products import LEAST_ROWS, Library, has_onednn, linear, products_by, times

T = TypeVar("T")

DEFAULT_MINUTES_ON_CPU = 3.0
_PRECISION_GAIN = 0.9  # 16 bit has to be faster by so much to be worth its rounding
_PRODUCTS_GAIN = 1.05  # another rounding of the sums has to bring something
_MEASURED_S = 0.5  # at least three turns of each; where they are short, as many as fit
_CLEAR = 3.0  # times as slow
_EVALUATIONS = 8
_LEAST_STEPS = 40
_SHORT = 64  # tokens
_SHARE_FOR_TRAINING = 0.6  # of the time; the rest goes to loading, the probe and judging


@dataclass
class Plan:
    """Settings in the order they were decided: (name, value as text, why)."""

    entries: list[tuple[str, str, str]] = field(default_factory=list)

    def decide(self, name: str, said: T | None, chosen: T, why: str) -> T:
        """The value of a setting: what was said, else what is chosen, entered with its reason."""
        value = chosen if said is None else said
        self.entries.append((name, _text(value), why if said is None else "you said so"))
        return value

    def replace(self, name: str, value: object, why: str) -> None:
        """Change a setting that was decided before."""
        self.entries = [(name, _text(value), why) if entry[0] == name else entry for entry in self.entries]


def choose_precision(run: Callable[[str], Any], device: torch.device) -> tuple[str, str, float | None]:
    """ "fp32" or "bf16" for the computing, why, and the seconds of one `run(precision)` where it was measured.

    run: one forward and backward in that precision.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return "bf16", "the GPU multiplies it natively", None
        return "fp32", "this GPU has no bfloat16", None
    if device.type != "cpu":
        return "fp32", f"the safe choice on {device.type}", None
    seconds = dict(zip(("fp32", "bf16"), fastest(partial(run, "fp32"), partial(run, "bf16")), strict=True))
    ratio = seconds["bf16"] / seconds["fp32"]
    if ratio < _PRECISION_GAIN:
        why = f"measured {1 / ratio:.1f} times as fast as fp32 here; adapters stay in fp32"
        return "bf16", why, seconds["bf16"]
    return "fp32", f"bfloat16 measured {ratio:.1f} times as slow on this processor", seconds["fp32"]


def choose_products(rows: int, fan_in: int, fan_out: int) -> tuple[Library, float]:
    """Which library needs less time for both products with the frozen weight of a layer on a processor, and how many
    times as fast oneDNN is.
    """
    if not has_onednn() or rows < LEAST_ROWS:
        return "usual", 1.0
    x, W, dy = torch.ones(rows, fan_in), torch.ones(fan_out, fan_in), torch.ones(rows, fan_out)

    def both(library: Library) -> None:
        with torch.no_grad(), products_by(library):
            linear(x, W, None)
            times(dy, W)

    usual, onednn = fastest(partial(both, "usual"), partial(both, "onednn"))
    faster = usual / onednn
    return ("onednn" if faster > _PRODUCTS_GAIN else "usual"), faster


def shorter_length(max_length: int, tokens: int, seconds_per_token: float, minutes: float) -> int:
    """Half the length, down to 64 tokens, where not even one epoch fits the time; seeing all rows is worth more."""
    fits = tokens * seconds_per_token <= _SHARE_FOR_TRAINING * 60 * minutes
    return max_length if fits or max_length <= _SHORT else max(_SHORT, max_length // 2)


def choose_steps(
    *, said: int | None, rows: int, per_step: int, epochs: float, seconds_per_step: float, seconds_left: float | None
) -> tuple[int, str]:
    """How many steps: those said, else the epochs; no more than the time allows.   seconds_left: None for no limit."""
    wanted = said or max(1, math.ceil(epochs * rows / per_step))
    if said is None:
        wanted = max(wanted, min(_LEAST_STEPS, 20 * wanted))  # a tiny data set is seen more often
    if seconds_left is None:
        return wanted, f"{wanted * per_step / rows:.1f} epochs of {rows:,} rows"
    fitting = int(seconds_left / seconds_per_step)
    if wanted <= fitting:
        return (
            wanted,
            f"{wanted * per_step / rows:.1f} epochs of {rows:,} rows, about {_minutes(wanted * seconds_per_step)}",
        )
    steps = max(min(wanted, _LEAST_STEPS), fitting)
    return steps, (
        f"{steps * per_step / rows:.1f} epochs: what fits the time at {seconds_per_step:.2f} s a step; "
        f"{wanted:,} steps would take {_minutes(wanted * seconds_per_step)} (--minutes)"
    )


def evaluation_interval(steps: int) -> int:
    """How many steps between evaluations: about eight in a run."""
    return max(1, math.ceil(steps / _EVALUATIONS))


def fastest(*runs: Callable[[], Any]) -> list[float]:
    """The shortest time of each, in seconds; taken by turns, so that what else the machine does meets them alike.

    The first call of each pays for what later ones find made; where it is long, and says enough, it is the last.
    """
    times = [[_seconds(run)] for run in runs]
    first = [found[0] for found in times]
    if max(first) > _MEASURED_S and max(first) > _CLEAR * min(first):
        return first
    least = 3 if max(first) < _MEASURED_S else 1
    until, rounds = time.perf_counter() + _MEASURED_S, 0
    while rounds < least or (time.perf_counter() < until and rounds < 50):
        for run, found in zip(runs, times, strict=True):
            found.append(_seconds(run))
        rounds += 1
    return [min(found[1:]) for found in times]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
