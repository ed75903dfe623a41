"""A table in memory: columns of equal length, and for each row where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smidgen.core.errors import DataError, nearest


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

    columns: dict[str, list[Any]]
    origins: list[str]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items() if len(values) != len(self.origins)}
        if lengths:
            raise DataError(f"a table of {len(self.origins)} rows was given columns of other lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def column(self, name: str) -> list[Any]:
        """The values of one column.  Raises DataError, with the names that exist, if there is none such."""
        if name not in self.columns:
            near = nearest(name, self.columns)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise DataError(f'There is no column "{name}".{hint} Columns: {", ".join(self.columns)}.')
        return self.columns[name]

    def select(self, indices: Sequence[int]) -> Table:
        """A new table of these rows, in this order."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Table(columns, [self.origins[i] for i in indices])

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
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(columns, [origin for table in tables for origin in table.origins])
