"""Custom: anything.  A file of yours says what is tuned, on what and by which loss; the rest is as for every task.

    smidgen tune --task FILE.py:NAME          task: FILE.py:NAME

NAME is a function that returns `Pieces` (pieces.py), or a class, your own `Task`.  The file is run because you name it:
a saved result tells which it was, and never runs it.
"""

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ..core.errors import DataError, ModelError, RecipeError
from ..data.table import Problem, Table
from .base import Asked, Batch, Examples, Task, TaskModel
from .pieces import TARGETS, Pieces, Rows, as_batch, call, form, told, wrong_with, wrong_with_model
from .python_file import names_file, object_in_file
from .registry import task

_AT_ONCE = 64  # rows whose targets are read together


def task_in_file(said: str) -> type[Task]:
    """The task that FILE.py:NAME says; the file is run.  Raises RecipeError."""
    found = object_in_file(said)
    if isinstance(found, type) and issubclass(found, Task):
        missing = sorted(found.__abstractmethods__) + [
            name for name in ("summary", "Settings", "roles") if not hasattr(found, name)
        ]
        if missing:
            raise RecipeError(f"{said} is a Task without {', '.join(missing)}")
        if "name" not in vars(found):
            found.name = Custom.name  # not what it inherits: its results are not those of another task
        return found
    if isinstance(found, type) or not callable(found):
        kind = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise RecipeError(f"{said} is {kind}; it is to be a function that returns Pieces, or a class derived from Task")
    return _bound(said, found)


def brings_model_and_data(said: str) -> bool:
    """True for FILE.py:NAME of a function, whose `Pieces` have all that a run needs."""
    try:
        return names_file(said) and issubclass(cls := task_in_file(said), Custom) and cls.file == said
    except RecipeError:
        return False


class _Row(NamedTuple):
    """A row of a data set, not read yet."""

    rows: Rows
    at: int

    def read(self) -> Any:
        return self.rows[self.at]

    def __repr__(self) -> str:
        """What is in the row, in short: a resumed run compares it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(as_batch(self.read()).items()):
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class CustomSettings:
    """None: what is to be said is said in the file."""


@task("custom")
class Custom(Task):
    """A task made of `Pieces`.  Each file and function has a class of its own, which `task_in_file` makes."""

    summary = "anything, from a Python file of yours with a model, data and a loss: --task FILE.py:NAME"
    Settings = CustomSettings
    roles = ()
    unit = "rows"
    split_words = "at random, seeded"

    file: ClassVar[str] = ""
    maker: ClassVar[Callable[[], Any] | None] = None

    def __init__(self, pieces: Pieces, metric: str | None = None) -> None:
        self.pieces = pieces
        self.metrics = (*pieces.metrics, "loss")
        self.metrics_below = frozenset({"loss", *pieces.lower_is_better})  # type: ignore[misc]
        self.judge_by(metric)
        self.notes = []
        self.labelled = True
        self._tried: nn.Module | None = None

    # -- reading ----------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        """where: the task's own file, for the data sets of its pieces, or FILE.py:NAME of a function that makes one."""
        pieces = cls._pieces()
        if where == cls.file:
            return {name: _table(rows, name) for name, rows in pieces.parts.items()}, []
        if not names_file(where):
            raise DataError(f"{where}: the rows of {cls.file} come from Python; say FILE.py:NAME of a data set")
        rows = object_in_file(where)
        try:
            rows = rows() if inspect.isroutine(rows) else rows
        except Exception as error:
            raise DataError(f"{where}: {told(error, inspect.getfile(rows))}") from error
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and len(rows)):
            raise DataError(f"{where} gives a {type(rows).__name__}; it is to give rows by number, one at least")
        return {"train": _table(rows, where.rpartition(":")[2])}, []

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        made = cls(cls._pieces(), asked.metric)
        if asked.dtype is not None:
            raise RecipeError(f"model.dtype: the model is as {cls.file} makes it; leave it out")
        made._tried = made._model(asked.seed)
        if wrong := wrong_with_model(made.pieces, made._tried, cls._path()):
            raise RecipeError(_listed(cls.file, wrong))
        return made

    @classmethod
    def _pieces(cls) -> Pieces:
        if cls.maker is None:
            raise RecipeError("a custom task is said by its file: --task FILE.py:NAME, or task: FILE.py:NAME")
        return _pieces_of(cls.file, cls.maker)

    @classmethod
    def _path(cls) -> str:
        return inspect.getfile(inspect.unwrap(cast(Callable[[], Any], cls.maker)))

    def check(self, table: Table) -> dict[int, str]:
        usual, problems = form(self.pieces.train[0]), {}
        for i, row in enumerate(table.column("row")):
            try:
                found = as_batch(row.read())
            except Exception as error:
                problems[i] = told(error, self._path())
                continue
            if not self.labelled:
                found.setdefault(TARGETS, torch.zeros(usual[TARGETS]))
            shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
            if shapes.keys() != usual.keys():
                problems[i] = f"it has {', '.join(shapes)}; the first training row has {', '.join(usual)}"
            elif shapes != usual and self.pieces.collate is None:
                other = next(name for name in usual if shapes[name] != usual[name])
                problems[i] = f"{other} has the shape {shapes[other]}; in the first training row it is {usual[other]}"
            elif broken := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
                problems[i] = f"not finite: {', '.join(broken)}"
        return problems

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> "CustomModel":
        model = self._tried if self._tried is not None else self._model(asked.seed)
        self._tried = None
        return CustomModel(model, self.pieces.head)

    def _model(self, seed: int) -> nn.Module:
        """The module, untouched each time.  Raises ModelError."""
        if isinstance(self.pieces.model, nn.Module):
            return copy.deepcopy(self.pieces.model)
        torch.manual_seed(seed)
        try:
            model = self.pieces.model()
        except Exception as error:
            raise ModelError(f"{self.file}: model: {told(error, self._path())}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.file}: model gives a {type(model).__name__}; it is to give a torch.nn.Module")
        return model

    # -- rows -------------------------------------------------------------------------------------------------------
    def encode(self, table: Table) -> Examples:
        rows: list[_Row] = list(table.column("row"))
        found = []
        for start in range(0, len(rows), _AT_ONCE):
            some = [row.read() for row in rows[start : start + _AT_ONCE]]
            found.append(self.pieces.batch(some).get(TARGETS, torch.zeros(len(some))))
        if len(shapes := {tuple(targets.shape[1:]) for targets in found}) > 1:
            raise DataError(f"{self.file}: targets have the shapes {sorted(shapes)}; `collate` is to pad them to one")
        return Examples([{"row": row} for row in rows], torch.cat(found), [1] * len(rows))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        batch = self.pieces.batch([examples.inputs[i]["row"].read() for i in indices])
        batch.setdefault(TARGETS, examples.targets[list(indices)])
        return batch

    def augment(self, batch: Batch) -> Batch:
        return self.pieces.augment(batch) if self.pieces.augment else batch

    # -- learning and judging ---------------------------------------------------------------------------------------
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        value, count = self.pieces.losses(outputs, batch[TARGETS]), len(batch[TARGETS])
        return value.sum() if value.ndim else value * count, count

    @torch.no_grad()
    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        found = {name: float(metric(answers, targets)) for name, metric in self.pieces.metrics.items()}
        return {**found, "loss": float(self.pieces.losses(answers, targets).mean())}

    @torch.no_grad()
    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        """Where the loss is the metric and is said per row: that, beside a 1 that counts rows."""
        value = self.pieces.losses(answers, targets) if self.metric == "loss" else torch.zeros(())
        return torch.stack([value, torch.ones_like(value)], dim=1) if value.ndim else None

    def value_of(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        return {"task": self.name, "file": self.file, "metric": self.metric}  # file: to be read, never run

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        if cls.maker is None:
            file = description.get("file") or "FILE.py:NAME"
            raise RecipeError(f"it was made with {file}, which is run only if you say so: --task {file}")
        return cls(cls._pieces(), description["metric"])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.labelled = labelled

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        return [
            {"row": row.at, "output": answer.tolist()} for row, answer in zip(table.column("row"), answers, strict=True)
        ]

    def save_body(self, body: nn.Module, folder: str) -> None:
        how = "adapters = smidgen.load(model, FOLDER); adapters.merge(); then save the model as your code does"
        raise RecipeError(f"{type(body).__name__} is yours, and how it is saved too. Merge it in Python: {how}")


class CustomModel(TaskModel):
    """The user's module as it is; its head is a part of it."""

    def __init__(self, body: nn.Module, head: str | None) -> None:
        super().__init__()
        self.body, self.head = body, nn.Identity()
        self.heads = (head,) if head else ()

    def forward(self, batch: Batch) -> Any:
        return call(self.body, batch)


@functools.cache
def _bound(said: str, maker: Callable[[], Any]) -> type[Custom]:
    return type("Custom", (Custom,), {"file": said, "maker": staticmethod(maker)})


@functools.cache
def _pieces_of(said: str, maker: Callable[[], Any]) -> Pieces:
    """What the user's function returns, checked as far as that goes without calling it.  Raises RecipeError."""
    try:
        pieces = maker()
    except Exception as error:
        raise RecipeError(f"{said}: {told(error, inspect.getfile(inspect.unwrap(maker)))}") from error
    if not isinstance(pieces, Pieces):
        raise RecipeError(f"{said} returns a {type(pieces).__name__}; it is to return smidgen.tasks.pieces.Pieces")
    if wrong := wrong_with(pieces):
        raise RecipeError(_listed(said, wrong))
    return pieces


def _table(rows: Rows, name: str) -> Table:
    indices = range(len(rows))
    return Table({"row": [_Row(rows, i) for i in indices]}, [f"{name}[{i}]" for i in indices])


def _listed(said: str, wrong: Sequence[str]) -> str:
    return f"{said} cannot be run:\n" + "\n".join(f"  {line}" for line in wrong)
