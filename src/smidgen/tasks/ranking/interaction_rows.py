"""Rows that say which user took which item, and perhaps how it was liked and when."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from ...core.errors import DataError
from ...data.interactions import (
    at_random,
    check_interaction,
    identity,
    interaction_columns,
    latest,
    leave_one_out,
)
from ...data.table import Table
from ...data.values import are_numbers, instant, number
from ..base import Asked
from .catalogue import Catalogue
from .recommenders import SIDES, Side

Split = Literal["leave_one_out", "time", "random"]


@dataclass(frozen=True)
class InteractionRows:
    """names: role -> column, of those that are there.

    as_numbers: whether times are numbers, in every file; None for as most of each file are.
    """

    names: Mapping[str, str]
    as_numbers: bool | None = None

    def learned(self, train: Table) -> Self:
        """With the kind of times that the training rows have: others could not be compared with them."""
        if "time" not in self.names:
            return self
        return replace(self, as_numbers=are_numbers(train.column(self.names["time"])))

    def check(self, table: Table, catalogue: Catalogue) -> dict[int, str]:
        """What is wrong with rows: no names, numbers or times, users or items that are not in the catalogue."""
        there = {role: name for role, name in self.names.items() if name in table.columns}
        as_numbers, problems = self.as_numbers, dict[int, str]()
        if as_numbers is None:
            as_numbers = "time" in there and are_numbers(table.column(there["time"]))
        for i in range(len(table)):
            row = {role: table.column(name)[i] for role, name in there.items()}
            what = check_interaction(row, as_numbers=as_numbers)
            for side in SIDES:
                if what is None and side in row and identity(row[side]) not in catalogue.rows[side]:
                    what = f'{side} "{row[side]}" is known neither to the base nor to the training rows'
            if what:
                problems[i] = what
        return problems

    def choose_split(self, said: Split | None, asked: Asked) -> Split:
        """How rows to judge by are held out, entered in the plan.  Raises DataError for one that needs a time."""
        ordered = "time" in self.names
        why = "each user's last interaction judges" if ordered else "there is no time to split by"
        chosen: Split = "leave_one_out" if ordered else "random"
        split = asked.plan.decide("split", said, chosen, why)
        if split != "random" and not ordered:
            raise DataError(f"task.split is {split} and no column says the time: --column time=NAME")
        return split

    def split(self, table: Table, how: Split, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the rows that stay and of those that judge."""
        if how == "random":
            return at_random(len(table), fraction, seed)
        times = self.times(table)
        if how == "time":
            return latest(times, fraction)
        return leave_one_out([identity(value) for value in table.column(self.names["user"])], times)

    def side(self, table: Table, side: Side, catalogue: Catalogue) -> list[int]:
        """The users or items as rows of the catalogue; zeros where the table has none, for predicting."""
        name = self.names.get(side)
        if name not in table.columns:
            return [0] * len(table)
        return [catalogue.rows[side][identity(value)] for value in table.column(str(name))]

    def pairs(self, table: Table, catalogue: Catalogue) -> list[tuple[int, int]]:
        return list(zip(*(self.side(table, side, catalogue) for side in SIDES), strict=True))

    def times(self, table: Table, *, in_order: bool = False) -> list[float]:
        """When each row was; without a column, in the order of the rows or later than all others."""
        name = self.names.get("time")
        if name in table.columns:
            return [instant(value) or 0.0 for value in table.column(str(name))]
        return [float(i) if in_order else math.inf for i in range(len(table))]

    def counts(self, table: Table, least_rating: float | None) -> list[bool]:
        """Which rows were liked enough to be learned and judged."""
        name = self.names.get("rating")
        if least_rating is None or name not in table.columns:
            return [True] * len(table)
        ratings = [number(value) for value in table.column(str(name))]
        return [rating is not None and rating >= least_rating for rating in ratings]

    def fitting(self, table: Table, *, labelled: bool) -> Self:
        """The columns of another file, of users alone where nothing is judged.  Raises DataError."""
        names = dict(self.names) if labelled else {"user": self.names["user"]}
        needed = ("user", "item") if labelled else ("user",)
        if any(names.get(role) not in table.columns for role in needed):
            names, _ = interaction_columns(table, {})
        return type(self)(names)
