"""Rows of texts: what is wrong with them, some of them to measure, and rows that come from the command line."""

from collections.abc import Iterable, Sequence
from typing import Any

from ...data.labels import check_text
from ...data.split import subset
from ...data.table import Table

_SAMPLE = 2000  # rows measured for their length


def wrong_texts(table: Table, columns: Iterable[str | None]) -> dict[int, str]:
    """Rows that are empty or no text in one of the columns: row -> what is wrong.  None is no column."""
    return {
        i: f'column "{column}": {what}'
        for column in columns
        if column is not None
        for i, value in enumerate(table.column(column))
        if (what := check_text(value))
    }


def some_of(table: Table, seed: int) -> Table:
    """Enough rows to tell how long they are."""
    return table.select(subset(len(table), None, _SAMPLE, seed))


def said_rows(column: str, inputs: Sequence[Any]) -> Table:
    """What was given with --text, as a table."""
    return Table({column: list(inputs)}, [f"--text {i + 1}" for i in range(len(inputs))])
