"""Pieces: a task of one's own in three things, a model, data and a loss; and everything that can be wrong with them.

return Pieces(model=net, train=pairs, loss=F.l1_loss)        pairs[i] = (x, target), called as net(x)
                                                             or a dict of tensors with "targets", as net(**others)
"""

import math
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.errors import nearest
from .base import Batch

TARGETS = "targets"
_TRIED = 4  # rows in a batch of the trial


class Rows(Protocol):
    """A map-style data set: `torch.utils.data.Dataset` with a length, a list ..."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What only you know; everything else is done for you.

    model: the pre-trained module, or a function that makes it; gives one tensor (N, ...) for a batch of N rows.
    train: the rows, each (x, target) or a dict of tensors with "targets" among them; float64 becomes float32.  A row
    is the same each time it is read, so that a run can be resumed and judged: chance belongs in `augment`.
    valid, test: such rows too; held out of `train` at random where they are not given.
    groups: one name or number per row of `train`: rows of one group stay on one side where rows are held out.
    loss: (outputs, targets) -> the mean over the rows, or one number per row (N,).
    metrics: name -> function of all outputs and targets.  The first one counts; with none the loss does.
    lower_is_better: which of them are.
    collate: makes a batch of a list of rows, in the form of a row; without it tensors are stacked.
    augment: disturbs a training batch at random; torch's own generator is seeded with the step.
    head: dotted name of a submodule that is trained whole, beside the adapter.
    """

    model: nn.Module | Callable[[], nn.Module]
    train: Rows
    loss: Callable[[Any, Any], Tensor]
    valid: Rows | None = None
    test: Rows | None = None
    groups: Sequence[Hashable] | None = None
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)
    lower_is_better: Sequence[str] = ()
    collate: Callable[[list[Any]], Any] | None = None
    augment: Callable[[Batch], Batch] | None = None
    head: str | None = None

    @property
    def parts(self) -> dict[str, Rows]:
        """The data sets that are there, by name."""
        said = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: rows for name, rows in said.items() if rows is not None}

    @property
    def group_of(self) -> list[Hashable] | None:
        """`groups` as a list; of an array or a tensor its numbers."""
        plain: Any = getattr(self.groups, "tolist", None)
        return None if self.groups is None else list(self.groups if plain is None else plain())

    def batch(self, rows: list[Any]) -> Batch:
        """Rows as one batch.  Raises ValueError, and whatever the user's `collate` raises."""
        from torch.utils.data import default_collate

        return as_batch((self.collate or default_collate)(rows))

    def losses(self, outputs: Any, targets: Tensor) -> Tensor:
        """What the loss says, in fp32: a scalar, or (N,)."""
        value = self.loss(_wide(outputs), targets)
        return value.float() if isinstance(value, Tensor) else torch.as_tensor(value)


def as_batch(said: Any) -> Batch:
    """(x, targets), a mapping of tensors, or x alone, as tensors by name.  Raises ValueError for anything else."""
    if isinstance(said, tuple | list) and len(said) == 2:
        said = {"inputs": said[0], TARGETS: said[1]}
    elif isinstance(said, Tensor):
        said = {"inputs": said}
    if not isinstance(said, Mapping):
        raise ValueError(f"a {type(said).__name__}, and neither (x, target) nor a dict of tensors")
    batch = {}
    for name, value in said.items():
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f'"{name}" is a {type(value).__name__}, and no tensor or number') from error
        batch[str(name)] = tensor.float() if tensor.dtype == torch.float64 else tensor
    return batch


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's outputs: net(x) for rows (x, target), net(name=tensor, ...) for rows with names."""
    inputs = {name: tensor for name, tensor in batch.items() if name != TARGETS}
    return model(inputs["inputs"]) if list(inputs) == ["inputs"] else model(**inputs)


def form(row: Any) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a row's tensors.  Raises ValueError as `as_batch`."""
    return {name: tuple(tensor.shape) for name, tensor in as_batch(row).items()}


def wrong_with(pieces: Pieces) -> list[str]:
    """What is wrong before anything is called: pieces that are of another kind, empty data, unknown names."""
    found = []
    if not (isinstance(pieces.model, nn.Module) or callable(pieces.model)):
        found.append(f"model is a {type(pieces.model).__name__}; it is a torch.nn.Module, or a function that makes one")
    for name, rows in {"train": pieces.train, **pieces.parts}.items():
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            found.append(f"{name} is a {type(rows).__name__}; it needs a length and rows by number, as a list has them")
        elif not len(rows):
            found.append(f"{name} is empty")
    found += _wrong_groups(pieces)
    functions = {"loss": pieces.loss, "collate": pieces.collate, "augment": pieces.augment}
    functions |= {f'metrics["{name}"]': function for name, function in pieces.metrics.items()}
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "loss"):
            found.append(f"{name} is a {type(function).__name__}; it is a function")
    if "loss" in pieces.metrics:
        found.append('metrics has a "loss", which is always there: choose another name')
    for name in pieces.lower_is_better:
        if name not in pieces.metrics:
            there = ", ".join(pieces.metrics) or "none"
            found.append(f'lower_is_better names "{name}", and the metrics are: {there} (the loss is known to be)')
    return found


def _wrong_groups(pieces: Pieces) -> Iterator[str]:
    if pieces.groups is None:
        return
    try:
        groups = pieces.group_of or []
    except TypeError:
        yield f"groups is a {type(pieces.groups).__name__}; it is a list, a name or number per row of train"
        return
    if hasattr(pieces.train, "__len__") and len(groups) != len(pieces.train):
        yield f"groups has {len(groups)} values, and train has {len(pieces.train)} rows; it has one per row"
    odd = [i for i, group in enumerate(groups) if not _names_a_group(group)]
    if odd:
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        yield f"groups[{odd[0]}] is a {type(groups[odd[0]]).__name__}; it is a name or a number{more}"


def _names_a_group(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return value is not None and not isinstance(value, Tensor)  # equal tensors have other hashes


def wrong_with_model(pieces: Pieces, model: nn.Module, file: str) -> list[str]:
    """What goes wrong when a few rows of each data set go through model, loss and metrics."""
    found = []
    if pieces.head is not None and pieces.head not in (names := [name for name, _ in model.named_modules() if name]):
        near = nearest(pieces.head, names) or names[-3:]
        found.append(f'head names "{pieces.head}", which the model does not have. Near it: {", ".join(near)}')
    if not any(True for _ in model.parameters()):
        found.append("model has no parameters")
    shapes: dict[tuple[int, ...], str] = {}
    for name, rows in pieces.parts.items():
        step = "rows"
        try:
            some = [rows[i] for i in range(min(_TRIED, len(rows)))]
            first, again = as_batch(some[0]), as_batch(rows[0])
            if any(not torch.equal(first[key].nan_to_num(), again[key].nan_to_num()) for key in first):
                found.append(f"{name}: row 0 is another each time it is read; what is drawn belongs in `augment`")
            step = "collate" if pieces.collate else "stacking the rows"
            batch = pieces.batch(some)
            if TARGETS not in batch:
                found.append(f'{name}: a batch has {", ".join(batch)} and no "{TARGETS}"')
                continue
            if pieces.augment and name == "train":
                step = "augment"
                batch = pieces.augment(dict(batch))
            step = "model"
            with torch.no_grad():
                outputs = _wide(call(model.eval(), batch))
        except Exception as error:
            found.append(f"{name}: {step}: {told(error, file)}")
            continue
        wrong = list(_wrong_outputs(pieces, outputs, batch[TARGETS], len(some), file))
        found += [f"{name}: {what}" for what in wrong]
        if isinstance(outputs, Tensor):
            shapes.setdefault(tuple(outputs.shape[1:]), name)
    if len(shapes) > 1:
        said = ", ".join(f"(N, {', '.join(map(str, shape))}) for {name}" for shape, name in shapes.items())
        found.append(f"model gives outputs of differing shapes: {said}; let `collate` pad the rows to one length")
    return found


def _wrong_outputs(pieces: Pieces, outputs: Any, targets: Tensor, rows: int, file: str) -> Iterator[str]:
    if not isinstance(outputs, Tensor):
        yield (
            f"model gives a {type(outputs).__name__}; the pieces take one tensor (N, ...). "
            "Wrap the model, or write a Task of your own (docs/add-a-task.md)"
        )
        return
    for what, tensor in (("model gives outputs", outputs), ("targets", targets)):
        if not tensor.ndim or len(tensor) != rows:
            yield f"{what} of shape {tuple(tensor.shape)} for {rows} rows; the first number is to be {rows}"
    if not torch.isfinite(outputs).all():
        yield "model gives outputs that are not finite"
    with torch.no_grad():
        try:
            loss = pieces.losses(outputs, targets)
            if tuple(loss.shape) not in ((), (rows,)):
                yield f"loss has the shape {tuple(loss.shape)}; it is the mean over the rows, or a number each ({rows})"
            elif not torch.isfinite(loss).all():
                yield f"loss is {loss.tolist()}; it is to be finite"
        except Exception as error:
            yield f"loss: {told(error, file)}"
        for name, metric in pieces.metrics.items():
            try:
                value = float(metric(outputs, targets))
                if math.isnan(value):
                    yield f'metrics["{name}"] is nan on {rows} rows'
            except Exception as error:
                yield f'metrics["{name}"]: {told(error, file)}'


def told(error: Exception, file: str) -> str:
    """What the user's own code raised, and in which line of their file or of one beside it."""
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == Path(file).parent]
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}{where}"


def _wide(outputs: Any) -> Any:
    return outputs.float() if isinstance(outputs, Tensor) and outputs.is_floating_point() else outputs
