"""What columns say of rows beside what is learned: which belong together, which came first, and what each counts.

group     rows of one user or document stay on one side of a split; else equal texts do
time      the latest rows judge; numbers, or dates in ISO 8601
weight    what a row counts in the loss: w / mean of the training rows' w.  Figures count every row once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..data.table import Table
from ..data.values import are_numbers, instant, number, wrong_time
from .base import Asked, Encoding, Task

ROW_ROLES = ("group", "time", "weight")


def apart(train: Table, asked: Asked, roles: Sequence[str]) -> tuple[Table, dict[str, str]]:
    """The table without the columns of these roles, so that none is taken for another, and what was said of others."""
    taken = {name for role, name in asked.columns.items() if role in roles}
    others = {name: values for name, values in train.columns.items() if name not in taken}
    return Table(others, train.origins), {role: name for role, name in asked.columns.items() if role not in roles}


@dataclass(frozen=True)
class RowRoles:
    """columns: role -> column, of the roles that were said.   mean: of the training rows' weights, once `learned`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    mean: float | None = None

    @classmethod
    def said(cls, train: Table, asked: Asked, roles: Sequence[str]) -> Self:
        """Those of these roles that were said, entered in the plan.  Raises DataError for a column not there."""
        columns = {role: name for role, name in asked.columns.items() if role in roles}
        for role, name in columns.items():
            train.column(name)
            asked.plan.decide(f"{role} column", name, name, "")
        return cls(columns)

    def split_words(self, usual: str, *, by_class: bool = False) -> str:
        """How rows are held out, in words.   usual: without these roles.   by_class: each class keeps its share."""
        if "time" in self.columns:
            return f'as the latest by "{self.columns["time"]}"'
        if "group" in self.columns:
            share = "by class, " if by_class else ""
            return f'{share}seeded, rows of one "{self.columns["group"]}" kept together'
        return usual

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """The column of groups, if one was said."""
        return table.column(self.columns["group"]) if "group" in self.columns else None

    def latest(self, table: Table, fraction: float) -> tuple[list[int], list[int]] | None:
        """Indices of the rows that stay and of the latest, ascending; None where no column says the time."""
        if "time" not in self.columns:
            return None
        times = [instant(time) or 0.0 for time in table.column(self.columns["time"])]
        order = sorted(range(len(table)), key=times.__getitem__)
        kept = len(order) - max(1, round(fraction * len(order)))
        return sorted(order[:kept]), sorted(order[kept:])

    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with the times of rows, and with their groups and weights where the table has them."""
        problems: dict[int, str] = {}
        if "time" in self.columns:
            name, times = self.columns["time"], table.column(self.columns["time"])
            as_numbers = are_numbers(times)
            for i, time in enumerate(times):
                if what := wrong_time(time, as_numbers=as_numbers):
                    problems[i] = f'column "{name}": {what}'
        if (name := self.columns.get("group", "")) in table.columns:
            for i, group in enumerate(table.column(name)):
                if group is None or group == "" or isinstance(group, list | dict):
                    problems[i] = f'column "{name}": {group!r:.40} is no group; it must be a name or number'
        if (name := self.columns.get("weight", "")) in table.columns:
            for i, weight in enumerate(table.column(name)):
                if (found := number(weight)) is None or found < 0:
                    problems[i] = f'column "{name}": {weight!r:.40} is no weight; it must be a number of at least 0'
        return problems

    def learned(self, train: Table) -> Self:
        """With the mean of the training rows' weights, where a column says them."""
        if "weight" not in self.columns:
            return self
        values = [number(value) or 0.0 for value in train.column(self.columns["weight"])]
        return replace(self, mean=sum(values) / len(values))

    def weights(self, table: Table) -> Tensor | None:
        """(N,), 1 on average of the training rows, of these if none were learned; None where no column says them."""
        name = self.columns.get("weight")
        if name is None or name not in table.columns:
            return None
        weights = torch.tensor([number(value) for value in table.column(name)])
        return weights / (weights.mean() if self.mean is None else torch.tensor(self.mean)).clamp_min(1e-12)

    def encoding(self, columns: Sequence[str | None], settings: Mapping[str, Any]) -> Encoding:
        """`Task.encoding` of these columns, None for none, and settings, with what rows count beside them."""
        names = (*columns, self.columns.get("weight"))
        return Encoding(columns=list(filter(None, names)), settings={**settings, "mean_weight": self.mean})


class TaskWithRoles(Task):
    """A task whose rows may have roles.   beside: those that were said."""

    beside = RowRoles()

    def take_roles(self, beside: RowRoles, *, by_class: bool = False) -> None:
        """Let the split follow these roles, and the report say what rows count.   by_class: as `split_words`."""
        self.beside, self.split_words = beside, beside.split_words(self.split_words, by_class=by_class)
        if weight := beside.columns.get("weight"):
            self.notes.append(f'Rows count by "{weight}" in the loss; the figures count each once.')

    def hold_out(self, table: Table, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        return self.beside.latest(table, fraction) or super().hold_out(table, fraction, seed)
