"""Rows of a data set that the user's file brings: read when they are needed, and what is wrong with one."""

import hashlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ...core.errors import DataError
from ...data.table import Table
from ..pieces import TARGETS, Pieces, Rows, as_batch, form, told
from .python_file import object_in_file


@dataclass(frozen=True)
class Row:
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


def as_table(rows: Rows, name: str) -> Table:
    """Rows as a table with one column, "row"; named "train[7]" where something is wrong with one."""
    indices = range(len(rows))
    return Table({"row": [Row(rows, i) for i in indices]}, [f"{name}[{i}]" for i in indices])


def rows_said(where: str) -> Table:
    """The rows that FILE.py:NAME says, a data set or a function that makes one.  Raises DataError."""
    rows = object_in_file(where)
    try:
        rows = rows() if inspect.isroutine(rows) else rows
    except Exception as error:
        raise DataError(f"{where}: {told(error, inspect.getfile(rows))}") from error
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and len(rows)):
        raise DataError(f"{where} gives a {type(rows).__name__}; it is to give rows by number, one at least")
    return as_table(rows, where.rpartition(":")[2])


def wrong_rows(table: Table, pieces: Pieces, path: str, *, labelled: bool) -> dict[int, str]:
    """Which rows are not as the first training row is, and how: row -> what.   path: of the user's file."""
    usual, problems = form(pieces.train[0]), {}
    for i, row in enumerate(table.column("row")):
        try:
            found = as_batch(row.read())
        except Exception as error:
            problems[i] = told(error, path)
            continue
        if not labelled:
            found.setdefault(TARGETS, torch.zeros(usual[TARGETS]))
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if shapes.keys() != usual.keys():
            problems[i] = f"it has {', '.join(shapes)}; the first training row has {', '.join(usual)}"
        elif shapes != usual and pieces.collate is None:
            other = next(name for name in usual if shapes[name] != usual[name])
            problems[i] = f"{other} has the shape {shapes[other]}; in the first training row it is {usual[other]}"
        elif broken := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
            problems[i] = f"not finite: {', '.join(broken)}"
    return problems
