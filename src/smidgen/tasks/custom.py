"""Custom: anything.  A file of yours says what is tuned, on what and by which loss; the rest is as for every task.

    smidgen tune --task FILE.py:NAME          task: FILE.py:NAME

NAME is a function that returns `Pieces` (pieces.py), or a class, your own `Task`.  The file is run because you name it:
a saved result tells which it was, and never runs it.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..core.errors import DataError, RecipeError
from ..data.table import Problem, Table
from .base import Asked, Batch, Examples, Task
from .judging import counted
from .own.maker import CustomModel, Maker
from .own.python_file import names_file
from .own.rows import Row, as_table, rows_said, wrong_rows
from .pieces import TARGETS, Pieces
from .registry import task

_GROUP = "group"  # the column of `Pieces.groups`
_AT_ONCE = 64  # rows whose targets are read together


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
    maker: ClassVar[Maker | None] = None

    def __init__(self, pieces: Pieces, metric: str | None = None) -> None:
        self.pieces = pieces
        self.metrics = (*pieces.metrics, "loss")
        self.metrics_below = frozenset({"loss", *pieces.lower_is_better})  # type: ignore[misc]
        self.judge_by(metric)
        self.notes = []
        self.labelled = True
        if pieces.groups is not None:
            self.split_words = "at random, seeded, rows of one group kept together"
        self._tried: nn.Module | None = None

    # -- reading ----------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        """where: the task's own file, for the data sets of its pieces, or FILE.py:NAME of a function that makes one."""
        pieces = cls._maker().pieces
        if where == cls.file:
            tables = {name: as_table(rows, name) for name, rows in pieces.parts.items()}
            if (groups := pieces.group_of) is not None:
                train = tables["train"]
                tables["train"] = Table({**train.columns, _GROUP: groups}, train.origins)
            return tables, []
        if not names_file(where):
            raise DataError(f"{where}: the rows of {cls.file} come from Python; say FILE.py:NAME of a data set")
        return {"train": rows_said(where)}, []

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        made = cls(cls._maker().pieces, asked.metric)
        if asked.dtype is not None:
            raise RecipeError(f"model.dtype: the model is as {cls.file} makes it; leave it out")
        made._tried = cls._maker().tried(asked.seed)
        return made

    @classmethod
    def _maker(cls) -> Maker:
        if cls.maker is None:
            raise RecipeError("a custom task is said by its file: --task FILE.py:NAME, or task: FILE.py:NAME")
        return cls.maker

    def check(self, table: Table) -> dict[int, str]:
        return wrong_rows(table, self.pieces, self._maker().path, labelled=self.labelled)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """What the pieces say of their training rows."""
        return table.columns.get(_GROUP)

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> CustomModel:
        model = self._tried if self._tried is not None else self._maker().model(asked.seed)
        self._tried = None
        return CustomModel(model, self.pieces.head)

    # -- rows -------------------------------------------------------------------------------------------------------
    def encode(self, table: Table) -> Examples:
        rows: list[Row] = list(table.column("row"))
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
        return counted(value) if value.ndim else None

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        return {"task": self.name, "file": self.file, "metric": self.metric}  # file: to be read, never run

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        if cls.maker is None:
            file = description.get("file") or "FILE.py:NAME"
            raise RecipeError(f"it was made with {file}, which is run only if you say so: --task {file}")
        return cls(cls.maker.pieces, description["metric"])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.labelled = labelled

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        return [
            {"row": row.at, "output": answer.tolist()} for row, answer in zip(table.column("row"), answers, strict=True)
        ]

    def save_body(self, body: nn.Module, folder: str) -> None:
        how = "adapters = smidgen.load(model, FOLDER); adapters.merge(); then save the model as your code does"
        raise RecipeError(f"{type(body).__name__} is yours, and how it is saved too. Merge it in Python: {how}")
