"""A table: columns of equal length, and for each row where it came from.

Columns are lists, or where the rows do not fit in memory `Lazy`: then a few rows that are selected are in memory, and
many are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.core.errors import DataError, nearest
from smidgen.data.lazy import Lazy, joined, picked, taken

FEW = 1 << 12  # rows that are in memory once they are selected


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: where it stands ("reviews.csv:17") and what is wrong with it."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Table:
    """Rows held as columns.

    columns: name -> one value per row; strings from CSV, the file's own types from JSON and Parquet.
    origins: one per row, "reviews.csv:17" (the line where the record starts) or "reviews.parquet row 17" (from 1).
    Raises DataError if the lengths differ.
    """

    columns: dict[str, Sequence[Any]]
    origins: Sequence[str]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items() if len(values) != len(self.origins)}
        if lengths:
            raise DataError(f"a table of {len(self.origins)} rows was given columns of other lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    @property
    def is_lazy(self) -> bool:
        """True if rows stay in their file."""
        return isinstance(self.origins, Lazy)

    def column(self, name: str) -> Sequence[Any]:
        """The values of one column.  Raises DataError, with the names that exist, if there is none such."""
        if name not in self.columns:
            near = nearest(name, self.columns)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise DataError(f'There is no column "{name}".{hint} Columns: {", ".join(self.columns)}.')
        return self.columns[name]

    def select(self, indices: Sequence[int]) -> Table:
        """A new table of these rows, in this order; in memory if they are few."""
        if len(indices) <= FEW:
            columns: dict[str, Sequence[Any]] = {name: taken(values, indices) for name, values in self.columns.items()}
            return Table(columns, taken(self.origins, indices))
        origins, *_ = picked({"": self.origins}, indices).values()
        return Table(picked(self.columns, indices), origins)

    def held(self) -> Table:
        """The same rows in memory."""
        return Table({name: list(values) for name, values in self.columns.items()}, list(self.origins))

    def where(self, i: int) -> str:
        """Where row i came from."""
        return self.origins[i]


def concatenate(tables: Sequence[Table]) -> Table:
    """One table below the other.  Raises DataError if their columns differ."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for other in tables[1:]:
        if set(other.columns) != set(first.columns):
            raise DataError(
                f"Files of one split have different columns: {', '.join(first.columns)} at {first.where(0)}, but "
                f"{', '.join(other.columns)} at {other.where(0)}. Rename the columns, or give the files one by one."
            )
    columns = {name: joined([table.columns[name] for table in tables]) for name in first.columns}
    return Table(columns, joined([table.origins for table in tables]))
