"""Whether a run fits in memory: said before it starts, and made true.

The weights are in memory by then.  What comes on top is estimated from two of the longest rows, forward only:

    trained parameters x (gradient + optimiser's states)
    what the graph keeps for backward, by the rows of a batch
    where blocks run again, all that one of them keeps by itself
    room between, as a share of what is kept at level off: a C library's allocator on a CPU does not put back together
    what was freed in pieces (measured .3 to .6 with glibc); CUDA's does better

If that is more than is free, blocks compute again what is cheap, then everything, and then the batch is run in parts.
An allocation that fails all the same, here or in any step, halves what is run at once; a step stays the same step.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..auto.plan import Plan
from ..core.errors import RecipeError
from ..core.free_memory import free_memory
from ..core.recompute import LEVELS, Level, blocks_of, recompute
from ..tasks.base import on_device
from ..training.compiling import refuse_compiling
from ..training.memory import fitting, is_out_of_memory, kept_for_backward
from ..training.optim import STATE_BYTES, optimizer_class
from .choose import Chosen
from .prepare import Work
from .schema import TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_ROWS = 2  # that are measured: some losses compare rows
_USABLE = 0.9  # of what is free
_ROOM = {"cpu": 0.5, "cuda": 0.2}  # of what is kept at level off


def refuse_impossible(said: TrainPart, work: Work) -> None:
    """Raise RecipeError for what this model or device cannot do, MissingDependency for what is not installed."""
    device = work.asked.device
    if said.recompute not in (None, "off") and not blocks_of(work.model):
        name = type(work.model.body).__name__
        raise RecipeError(
            f"train.recompute: {said.recompute} needs blocks, and none are recognised in {name}. Leave it out"
        )
    if said.offload == "cpu" and device.type != "cuda":
        raise RecipeError(
            f"train.offload: cpu moves what a GPU keeps to the host; this run is on {device.type}. Leave it out"
        )
    if said.compile:
        refuse_compiling(work.model.body, device)
    optimizer_class(said.optimizer or "adamw")


def choose_memory(
    said: TrainPart, chosen: Chosen, work: Work, trained: int, accelerator: "Accelerator", plan: Plan
) -> None:
    """Choose what blocks keep, and in how many parts a batch is run.   trained: how many parameters are."""
    free = free_memory(accelerator.device)
    if free is None or chosen.shard:
        unknown = "a base in shards is not estimated" if chosen.shard else "how much memory is free is not known here"
        chosen.recompute = plan.decide("recompute", said.recompute, "off", unknown)
        return
    fixed = trained * (4 + STATE_BYTES[chosen.optimizer])
    blocks = len(blocks_of(work.model))
    levels: tuple[Level, ...] = (said.recompute,) if said.recompute else LEVELS if blocks else ("off",)
    per_row = 0.0
    for level in levels:  # one after the other: mostly the first fits, and nothing more is measured
        per_row = _per_row(work, accelerator, level, blocks, free, is_sent_away=said.offload == "cpu")
        chosen.recompute = level
        if fixed + chosen.rows * per_row <= _USABLE * free:
            break
    split = chosen.split
    while chosen.rows > 1 and fixed + chosen.rows * per_row > _USABLE * free:
        chosen.split *= 2
    weights = sum(t.nbytes for t in itertools.chain(work.model.parameters(), work.model.buffers()))
    why = {
        "off": "all that backward needs fits",
        "cheap": "else it does not fit: norms and activations run once more in the backward",
        "all": "else it does not fit: every block runs once more in the backward",
    }
    plan.decide("recompute", said.recompute, chosen.recompute, why[chosen.recompute])
    if chosen.compile and chosen.recompute != "off":
        chosen.compile = False
        plan.replace("compile", False, "memory is short: blocks that recompute are not compiled")
    if chosen.split > split:
        _say_split(plan, chosen, "more does not fit in memory")
    needed = weights + fixed + chosen.rows * per_row
    what = f"weights {_size(weights)}, trained {_size(fixed)}, kept for backward {_size(chosen.rows * per_row)}"
    plan.decide("memory", None, f"about {_size(needed)} of {_size(weights + free)}", what)


def within_memory(run: Callable[[], T], chosen: Chosen, plan: Plan) -> T:
    """run(), with the batch in twice as many parts as often as memory asks; the plan says so.   Raises OutOfMemory."""

    def at(split: int) -> T:
        chosen.split = split
        return run()

    before = chosen.split
    result, split = fitting(at, chosen.batch, before)
    if split > before:
        _say_split(plan, chosen, "more did not fit in memory when it was tried")
    return result


def _per_row(
    work: Work, accelerator: "Accelerator", level: Level, blocks: int, free: int, *, is_sent_away: bool
) -> float:
    """Bytes that a row of the longest takes while it is trained on.

    is_sent_away: the inputs of blocks leave the device, but for those of two.
    Where not even two rows can be tried, they take at least what is free.
    """
    longest = max(range(len(work.train)), key=work.train.lengths.__getitem__)
    batch = on_device(work.task.collate(work.train, [longest] * _ROWS), accelerator.device)

    def kept() -> float:
        try:
            with accelerator.autocast():
                return kept_for_backward(work.model, lambda: work.task.loss(work.model(batch), batch)) / _ROWS
        except Exception as error:
            if is_out_of_memory(error):
                return free / _ROWS
            raise

    work.model.train()
    whole = kept()
    room = _ROOM.get(accelerator.device.type, 0.5) * whole
    if level == "off":
        return whole + room
    with recompute(work.model, level):
        less = kept()
    held = less * min(1.0, 2 / blocks) if is_sent_away and level == "all" else less
    return held + (whole - less) / blocks + room


def _say_split(plan: Plan, chosen: Chosen, why: str) -> None:
    plan.replace("batch", f"{chosen.batch}, {chosen.rows} at a time", f"{why}; the step stays that of {chosen.batch}")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 5e7 else f"{size_bytes / 1e6:.1f} MB"
