"""Cut: the modules of a model that give the same each time, and those of them whose output the rest reads.

    settled   nothing trained has a part in its output: with gradients on, the output requires none
    unit      a settled module as high up as they go, whose output is one tensor with the rows of the batch in front
    read      a unit whose output something reads that is no unit: what has to be kept.  The other units need not run

Found by watching the model run, so no model has to be known: blocks of transformers, stages of a CNN, towers of two.
What is read is told by a gradient: units give leaves, and where the loss has a gradient, somebody has read.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import HELD
from ..core.quantised_linear import own_weights
from ..core.targets import modules_of
from ..tasks.base import Batch

Call = Callable[..., Any]
Loss = Callable[[Batch], Tensor]
_SIDES = 4  # texts of a row that go through the model as rows of one batch, at most
_WORTH = 0.05  # of what is saved: a read unit that costs less is run, if nothing more has to be kept for that


@dataclass(frozen=True)
class Unit:
    """One call of a module.   call: which one of a forward pass.   sides: rows of its output for a row of the batch.

    shape: of its output behind the rows, the length as it was.   length: (argument, dimension) where the length of a
    batch stands, which is the output's second dimension; None where all batches have the same shape.
    cost: multiplications, of the batch that was watched.   read: its output has to be kept.
    """

    path: str
    call: int
    sides: int
    shape: tuple[int, ...]
    length: tuple[int | str, int] | None
    dtype: torch.dtype
    device: torch.device
    cost: float
    remake: Callable[[Tensor], Any] = dataclasses.field(compare=False)  # of the output around its tensor
    read: bool = False

    def fits(self, output: Tensor, rows: int) -> bool:
        """True if an output for so many rows has the shape that was watched, whatever its length."""
        known = self.shape if self.length is None else (output.shape[1], *self.shape[1:])
        return not output.is_nested and tuple(output.shape) == (self.sides * rows, *known)

    def shape_for(self, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the output for a batch of so many rows."""
        if self.length is None:
            return (self.sides * rows, *self.shape)
        name, dimension = self.length
        found = args[name] if isinstance(name, int) else kwargs[name]
        return (self.sides * rows, found.shape[dimension], *self.shape[1:])


@dataclass(frozen=True)
class _Seen:
    """One call as it was watched."""

    shapes: dict[int | str, tuple[int, ...]]  # of its arguments
    output: Tensor | None  # on the meta device; None where it is not one tensor of numbers
    remake: Callable[[Tensor], Any] | None
    device: torch.device
    depends: bool


def find_units(model: nn.Module, loss: Loss, batches: tuple[Batch, Batch], rows: tuple[int, int]) -> list[list[Unit]]:
    """Ways to cut the model, coarse ones first: each the units in the order in which they run, those read marked.

    batches: two, of different numbers of rows and lengths.   What is trained is what requires a gradient.
    """
    first, second = (_watch(model, loss, batch) for batch in batches)
    costs = _costs(model, first)
    candidates: dict[str, list[Unit]] = {}
    for path, calls in first.items():
        module = model.get_submodule(path)
        trained = any(p.requires_grad for p in module.parameters()) or any(HELD in m._modules for m in module.modules())
        others = second.get(path, [])
        if trained or len(others) != len(calls):
            continue
        units = [_unit(path, i, pair, rows, costs) for i, pair in enumerate(zip(calls, others, strict=True))]
        whole = [unit for unit in units if unit is not None]
        if len(whole) == len(calls):
            candidates[path] = whole
    found: list[list[Unit]] = []
    level = _highest(candidates, [path for path, _ in modules_of(model) if path])
    while level and len(found) < 4:
        try:
            marked = _worth_it(model, [unit for path in level for unit in candidates[path]], loss, batches[0])
        except Exception:  # whatever a model does that finds its modules not run: a finer cut may do
            marked = []
        if any(unit.read for unit in marked) and any(unit.cost for unit in marked):
            found.append(marked)
        lower = [path for path in level for path in _highest(candidates, _below(model, path)) or [path]]
        level = lower if lower != level else []
    return found


@contextmanager
def forwards(model: nn.Module, units: Sequence[Unit], act: Callable[[Unit, Call], Call]) -> Iterator[None]:
    """While the context lasts, the units' modules run `act(unit, forward)` in place of their forward."""
    calls: dict[str, list[Unit]] = {}
    for unit in units:
        calls.setdefault(unit.path, []).append(unit)
    placed: list[tuple[nn.Module, Any]] = []
    try:
        for path, of_module in calls.items():
            module = model.get_submodule(path)
            run = module.forward
            placed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _in_turn([act(unit, run) for unit in of_module])
        yield
    finally:
        for module, before in placed:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def taken_apart(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]] | None:
    """The one tensor in what a module gave, and how the rest is put around another; None where there is more to it."""
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    kind: Any = type(output)
    is_row = kind in (tuple, list)
    items: dict[Any, Any] = dict(enumerate(output)) if is_row else dict(output) if isinstance(output, Mapping) else {}
    tensors = [key for key, value in items.items() if isinstance(value, Tensor)]
    if len(tensors) != 1:
        return None
    key = tensors[0]
    tensor, items[key] = items[key], None
    if not all(value is None or isinstance(value, bool | int | float | str) for value in items.values()):
        return None

    def remake(other: Tensor) -> Any:
        whole = {**items, key: other}
        return kind(whole.values()) if is_row else kind(**whole)

    return tensor, remake


def _in_turn(calls: list[Call]) -> Call:
    """The first of these the first time, and so on; the last of them is followed by the first."""
    count = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return calls[(count - 1) % len(calls)](*args, **kwargs)

    return forward


def _watch(model: nn.Module, loss: Loss, batch: Batch) -> dict[str, list[_Seen]]:
    """All calls of one forward pass by the path of their module."""
    found: dict[str, list[_Seen]] = {}

    def hook(path: str) -> Call:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            said: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            shapes = {name: tuple(value.shape) for name, value in said if isinstance(value, Tensor)}
            tensor, remake = taken_apart(output) or (None, None)
            if tensor is None or not tensor.is_floating_point() or not tensor.ndim:
                found.setdefault(path, []).append(_Seen(shapes, None, None, torch.device("cpu"), True))
                return
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            depends = tensor.requires_grad or not torch.is_grad_enabled()  # within a Function nothing tells
            found.setdefault(path, []).append(_Seen(shapes, empty, remake, tensor.device, depends))

        return note

    handles = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in modules_of(model) if path]
    try:
        with torch.enable_grad():
            loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _unit(
    path: str, call: int, pair: tuple[_Seen, _Seen], rows: tuple[int, int], costs: Mapping[str, float]
) -> Unit | None:
    """The call as a unit, if it is settled and its output has the rows in front."""
    one, other = pair
    if one.output is None or other.output is None or one.remake is None or one.depends or other.depends:
        return None
    shape, another = tuple(one.output.shape), tuple(other.output.shape)
    sides, rest = divmod(shape[0], rows[0])
    if rest or not 1 <= sides <= _SIDES or another[0] != sides * rows[1] or len(shape) != len(another):
        return None
    length = None
    if shape[1:] != another[1:]:
        if shape[2:] != another[2:]:
            return None
        places = (
            (name, dimension)
            for name, sizes in one.shapes.items()
            for dimension, size in enumerate(sizes)
            if size == shape[1] and len(there := other.shapes.get(name, ())) > dimension
            if there[dimension] == another[1]
        )
        length = next(places, None)
        if length is None:
            return None
    return Unit(path, call, sides, shape[1:], length, one.output.dtype, one.device, costs.get(path, 0.0), one.remake)


def _costs(model: nn.Module, seen: Mapping[str, list[_Seen]]) -> dict[str, float]:
    """Multiplications of each module, those of the modules below it included: of a weight, its size per place."""
    costs: dict[str, float] = {}
    for path, calls in seen.items():
        weight = own_weights(model.get_submodule(path)).get("weight")
        if weight is None or weight.ndim < 2 or isinstance(model.get_submodule(path), nn.Embedding):
            continue
        cost = sum(weight.numel() * call.output.numel() / weight.shape[0] for call in calls if call.output is not None)
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            above = ".".join(parts[:end])
            costs[above] = costs.get(above, 0.0) + cost
    return costs


def _highest(candidates: Mapping[str, Any], paths: Sequence[str]) -> list[str]:
    """Those of the paths that are candidates and below no other that is, in the order in which they were called."""
    allowed = set(paths)
    chosen: list[str] = []
    for path in sorted(allowed & candidates.keys(), key=lambda path: path.count(".")):
        if not any(path.startswith(f"{other}.") for other in chosen):
            chosen.append(path)
    return [path for path in candidates if path in set(chosen)]


def _below(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in modules_of(model.get_submodule(path)) if name]


def _worth_it(model: nn.Module, units: list[Unit], loss: Loss, batch: Batch) -> list[Unit]:
    """The units with those marked that are read.

    Without such as cost little, if nothing more has to be kept where they run, with what they need that costs little.
    """
    read = _read(model, units, loss, batch)
    most = _WORTH * sum(unit.cost for unit in units)
    for unit in [unit for unit in units if unit in read and unit.cost < most]:
        run, still = {unit.path}, {unit}
        while still - read or unit in still:
            run |= {other.path for other in still - read}
            fewer = [other for other in units if other.path not in run]
            if not fewer or sum(other.cost for other in units if other.path in run) >= most:
                break
            still = _read(model, fewer, loss, batch)
        else:
            units, read = fewer, still
    return [dataclasses.replace(unit, read=unit in read) for unit in units]


def _read(model: nn.Module, units: Sequence[Unit], loss: Loss, batch: Batch) -> set[Unit]:
    """The units whose output has a part in the loss other than through another unit."""
    leaves: dict[Unit, Tensor] = {}

    def keep(unit: Unit, run: Call) -> Call:
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            found = taken_apart(output)
            assert found is not None
            leaves[unit] = found[0].detach().clone().requires_grad_()  # what follows may write into the output
            return output

        return kept

    def give(unit: Unit, run: Call) -> Call:
        return lambda *args, **kwargs: unit.remake(leaves[unit].clone())

    with forwards(model, units, keep), torch.no_grad():
        loss(batch)
    with forwards(model, units, give), torch.enable_grad():
        total = loss(batch)
    if not total.requires_grad:
        return set()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        unit for unit, gradient in zip(leaves, gradients, strict=True) if gradient is not None
    }  # zero may be chance
