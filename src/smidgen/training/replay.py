"""Replay: what the frozen part of a model gives is computed once per row, kept, and given again.

    recorded     h_i = what the units that are read gave for row i           replay_cut.py says which, replay_store.py
    replayed     those units give h_i, padded to the batch; the others are not run      keeps the numbers

Everything else, embeddings' sums, masks, rotary tables and all that is trained, is the model's own forward.  What the
rows are padded to changes the rounding of a matrix product, so a replayed row can differ from a computed one in the
last bits; what is recorded comes from batches that are the same in every run, so a replayed run repeats bit for bit.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import LengthBucketedBatches
from ..tasks.base import Batch, Examples, Task, on_device
from .replay_cut import Call, Unit, find_units, forwards, taken_apart
from .replay_store import Store
from .trials import undone

if TYPE_CHECKING:
    from accelerate import Accelerator

_ALIKE = {"no": 1e-3, "bf16": 5e-2}  # share of the norm: other padding, so sums in another order
_FEW, _MORE = 2, 3  # rows of the two batches that are watched
_DRAWS = 8  # of a batch, to see whether it is always the same


class Replay:
    """The rows of some sets of examples, replayed where they are kept."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], store: Store, sets: Mapping[str, Examples]) -> None:
        self.model, self.units, self.store = model, list(units), store
        self.sets = dict(sets)
        self._numbers = {unit: number for number, unit in enumerate(unit for unit in units if unit.read)}

    @contextmanager
    def rows(self, examples: Examples, indices: Sequence[int]) -> Iterator[None]:
        """Within this context the model is called with the batch of these rows, and no other.

        They are replayed if they are kept; without gradients they are recorded; else the model runs as it is.
        """
        name = next((name for name, known in self.sets.items() if known is examples), "")
        if self.store.has(name, indices):
            with forwards(self.model, self.units, lambda unit, run: self._given(unit, name, indices)):
                yield
        elif self.store.takes(name) and not torch.is_grad_enabled():
            taken: dict[Unit, Tensor] = {}
            with forwards(self.model, self.units, lambda unit, run: self._taken(unit, run, taken)):
                yield
            if all(unit in taken and unit.fits(taken[unit], len(indices)) for unit in self._numbers):
                self.store.put(name, indices, [taken[unit] for unit in self._numbers])
            else:
                self.store.give_up(name)
        else:
            yield

    def fill(self, name: str, task: Task, accelerator: "Accelerator", batch: int) -> None:
        """Record all rows of a set, in batches that are the same in every run and on every process."""
        examples, training = self.sets[name], self.model.training
        self.model.eval()
        for indices in LengthBucketedBatches(examples.lengths, batch_size=batch, seed=0, shuffle=False):
            if self.store.takes(name) and not self.store.has(name, indices):
                with torch.no_grad(), accelerator.autocast(), self.rows(examples, indices):
                    self.model(on_device(task.collate(examples, indices), accelerator.device))
        self.model.train(training)

    def _taken(self, unit: Unit, run: Call, taken: dict[Unit, Tensor]) -> Call:
        if not unit.read:
            return run

        def recorded(*args: Any, **kwargs: Any) -> Any:
            found = taken_apart(run(*args, **kwargs))
            assert found is not None
            kept = found[0].to(self.store.dtype or found[0].dtype, copy=True)  # what follows may write into it
            taken[unit] = kept
            return unit.remake(found[0] if kept.dtype == found[0].dtype else kept.to(found[0].dtype))

        return recorded

    def _given(self, unit: Unit, name: str, indices: Sequence[int]) -> Call:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            rows = self.store.get(name, self._numbers[unit], indices) if unit.read else []
            device = rows[0].device if rows else unit.device
            whole = torch.zeros(unit.shape_for(len(indices), args, kwargs), dtype=unit.dtype, device=device)
            if rows:
                by_row = whole.view(unit.sides, len(indices), *whole.shape[1:])
                for place, row in enumerate(rows):
                    if unit.length is None:
                        by_row[:, place] = row
                    else:  # beyond the shorter of the two is padding
                        length = min(row.shape[1], whole.shape[1])
                        by_row[:, place, :length] = row[:, :length]
            return unit.remake(whole.to(unit.device))

        return replayed


def replayed(
    replay: Replay | None, examples: Examples, indices: Sequence[int]
) -> contextlib.AbstractContextManager[None]:
    """`Replay.rows` where there is one."""
    return contextlib.nullcontext() if replay is None else replay.rows(examples, indices)


def size_of(units: Sequence[Unit], watched: Examples, examples: Examples, dtype: str = "") -> int:
    """About how many bytes the rows of some examples take.   watched: what the units were found with."""
    longest = sorted(watched.lengths)[_FEW - 1]  # of the rows whose shapes the units have
    size = 0.0
    for unit in units:
        rows = len(examples) if unit.length is None else sum(examples.lengths) / longest
        itemsize = (getattr(torch, dtype) if dtype else unit.dtype).itemsize
        size += unit.read * unit.sides * math.prod(unit.shape) * itemsize * rows
    return round(size)


def find_replay(model: nn.Module, task: Task, examples: Examples, accelerator: "Accelerator") -> tuple[list[Unit], str]:
    """The units of a model whose rows can be kept, or none and the reason why not.

    What is trained is what requires a gradient.  A cut is taken only if a few rows replayed, in batches other than
    those in which they were recorded, give the outputs and the gradients that the model gives as it is.
    """
    if len(examples) < _FEW + _MORE:
        return [], f"there are only {len(examples)} training rows"
    order = sorted(range(len(examples)), key=lambda i: examples.lengths[i])
    few, more = order[:_FEW], order[-_MORE:]
    if _is_drawn(task, examples, few):
        return [], "training rows are disturbed at random, another way each time"
    batches = tuple(on_device(task.collate(examples, rows), accelerator.device) for rows in (few, more))

    def loss(batch: Batch) -> Tensor:
        with accelerator.autocast():
            return task.loss(model(batch), batch)[0]

    training = model.training
    why = "what is trained begins at the bottom of the model"
    try:
        with undone(model):
            for units in find_units(model.eval(), loss, (batches[0], batches[1]), (_FEW, _MORE)):
                try:
                    why = _difference(model, task, units, examples, (few, more), accelerator)
                except Exception as error:  # whatever a model does that finds other modules not run
                    why = (
                        f"replayed, the model fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                    )
                if not why:
                    return units, ""
    finally:
        model.train(training)
    return [], why


def _difference(
    model: nn.Module,
    task: Task,
    units: Sequence[Unit],
    examples: Examples,
    parts: tuple[list[int], list[int]],
    accelerator: "Accelerator",
) -> str:
    """Where replayed rows give something else, in words; nothing if they do not."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def run(rows: list[int]) -> list[Tensor]:
        """The loss and its gradients, the model as in training."""
        batch = on_device(task.collate(examples, rows), accelerator.device)
        torch.manual_seed(0)  # of adapters' dropout
        with accelerator.autocast():
            loss = task.loss(model(batch), batch)[0]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return [loss.detach(), *(g for g in gradients if g is not None)]

    few, more = parts
    tolerance = _ALIKE["bf16" if any(unit.dtype.itemsize < 4 for unit in units) else accelerator.mixed_precision]
    for recorded, rows in (((few, more), few + more), ((few + more,), few), ((more,), more)):
        replay = Replay(model, units, Store({"trial": len(examples)}, limit_bytes=1 << 40), {"trial": examples})
        model.eval()
        for some in recorded:
            with torch.no_grad(), accelerator.autocast(), replay.rows(examples, some):
                model(on_device(task.collate(examples, some), accelerator.device))
        model.train()
        with replay.rows(examples, rows):
            found = run(rows)  # first: what the model as it is may leave behind would be found
        expected = run(rows)
        if len(found) != len(expected):
            return "replayed, other parameters get a gradient"
        for what, pairs in (("loss differs", slice(0, 1)), ("gradients differ", slice(1, None))):
            before, after = (torch.cat([t.double().flatten() for t in tensors[pairs]]) for tensors in (expected, found))
            gap = float((after - before).norm() / before.norm().clamp_min(1e-30))
            if not gap <= tolerance:
                return f"replayed, its {what} by {gap:.1%}"
    return ""


def _is_drawn(task: Task, examples: Examples, rows: Sequence[int]) -> bool:
    """True if a training batch of the same rows is another each time."""
    plain = task.collate(examples, rows)
    with torch.random.fork_rng(devices=[]):  # batches are made on the CPU
        for seed in range(_DRAWS):
            torch.manual_seed(seed)
            drawn = task.augment(task.collate(examples, rows))
            if not all(name in drawn and torch.equal(tensor, drawn[name]) for name, tensor in plain.items()):
                return True
    return False
