"""Parquet and Arrow files, saved data set folders and data sets of the Hugging Face hub: all are Arrow tables inside.

Numbers that stand for named classes (the `ClassLabel` of `datasets`) become their names.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from smidgen.core.errors import DataError, MissingDependency
from smidgen.data.lazy import Lazy, Read
from smidgen.data.table import Table

Part = tuple[int, Callable[[str], Any]]  # how many rows, and what gives a column of them by name

# builders of `datasets` that read plain tables; others unpack archives and decode what is in them
_TABLE_BUILDERS = {"arrow", "cache", "csv", "json", "parquet", "text"}


def read_arrow_file(path: Path, name: str, *, lazily: bool = False) -> Table:
    """A Parquet file, or an Arrow file of either layout (with a footer, or a stream).  Raises DataError.

    lazily: columns stay in the file; of Parquet a row group is read at a time, Arrow is mapped.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing(name) from None
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        source = pyarrow.memory_map(str(path)) if lazily else pyarrow.OSFile(str(path))
        if magic.startswith(b"PAR1"):
            parts, schema = _row_groups(pyarrow.parquet.ParquetFile(source))
        elif magic == b"ARROW1":
            parts, schema = _batches(pyarrow.ipc.open_file(source))
        else:
            whole = pyarrow.ipc.open_stream(source).read_all()
            parts, schema = [(whole.num_rows, whole.column)], whole.schema
        names = [column for column in schema.names if not column.startswith("__index_level_")]
        described = (schema.metadata or {}).get(b"huggingface")
        features = json.loads(described)["info"]["features"] if described else {}
        table = _table(parts, names, features, name)
        return table if lazily else table.held()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read as Parquet or Arrow; it may be cut short: {error}") from None


def _row_groups(file: Any) -> tuple[list[Part], Any]:
    """The row groups of a Parquet file, and its schema."""

    def column(group: int) -> Callable[[str], Any]:
        return lambda name: file.read_row_group(group, columns=[name]).column(name)

    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return [(size, column(group)) for group, size in enumerate(sizes)], file.schema_arrow


def _batches(file: Any) -> tuple[list[Part], Any]:
    """The batches of an Arrow file with a footer, and its schema."""

    def column(batch: int) -> Callable[[str], Any]:
        return lambda name: file.get_batch(batch).column(name)

    sizes = [file.get_batch(batch).num_rows for batch in range(file.num_record_batches)]
    return [(size, column(batch)) for batch, size in enumerate(sizes)], file.schema


def load_saved(folder: Path) -> dict[str, Any]:
    """The `datasets.Dataset`s of a folder written by `save_to_disk`, by split name."""
    try:
        import datasets
    except ImportError:
        raise _missing(str(folder)) from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` has no one base class: OSError, KeyError, ArrowInvalid ... all come out
        raise DataError(f"{folder} is a saved data set that cannot be read: {_in_one_line(error)}") from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def load_from_hub(name: str) -> dict[str, Any]:
    """The `datasets.Dataset`s of "owner/name" or "owner/name:configuration" on the hub, by split name.

    Raises DataError with what `datasets` said: unreachable, unknown, private, or a configuration must be chosen.
    """
    try:
        import datasets
    except ImportError:
        raise _missing(name) from None
    repository, _, configuration = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(repository, configuration or None)
        if builder.name not in _TABLE_BUILDERS:
            raise DataError(f"it is read by the {builder.name} builder, and only tables of text are read here")
        loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # as above
        raise DataError(
            f'"{name}" is not a file or folder here, and as a data set of the Hugging Face hub it cannot be loaded: '
            f"{_in_one_line(error)}. Check the name and the connection, or give a file. "
            'A configuration is chosen with a colon: "nyu-mll/glue:sst2".'
        ) from None
    return dict(loaded)


def from_dataset(dataset: Any, name: str, *, lazily: bool = False) -> Table:
    """A `datasets.Dataset` as a Table.   lazily: columns stay in its files, which it has mapped."""
    arrow = dataset.with_format("arrow")

    def column(column: str) -> Any:
        return _Rows(arrow.select_columns([column]), column)

    table = _table([(len(dataset), column)], dataset.column_names, dataset.features.to_dict(), name)
    return table if lazily else table.held()


class _Rows:
    """One column of a `datasets.Dataset`, with the two ways of reading that Arrow's own columns have."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column

    def slice(self, start: int, count: int) -> Any:
        return self._dataset[start : start + count].column(self._column)

    def take(self, rows: list[int]) -> Any:
        return self._dataset[rows].column(self._column)


def _table(parts: Sequence[Part], names: Sequence[str], features: Mapping[str, Any], name: str) -> Table:
    """Lazy columns over parts of a file that follow on each other."""
    starts = list(accumulate((size for size, _ in parts), initial=0))
    rows = range(starts[-1])

    def reader(column: str) -> Read:
        inner, classes = _class_names(features.get(column))
        last: tuple[int, Any] = (-1, None)

        def values(part: int, places: list[int]) -> list[Any]:
            nonlocal last
            try:
                if last[0] != part:
                    last = part, parts[part][1](column)
                in_order = places == list(range(places[0], places[0] + len(places)))
                found = last[1].slice(places[0], len(places)) if in_order else last[1].take(places)
                return list(found.to_pylist())
            except (OSError, ValueError) as error:  # those of pyarrow are ValueErrors
                raise DataError(
                    f'column "{column}" of {name} cannot be read; is it damaged? {_in_one_line(error)}'
                ) from None

        def read(wanted: Sequence[int]) -> list[Any]:
            found: list[Any] = []
            for part, some in groupby(wanted, key=lambda row: bisect_right(starts, row) - 1):
                found += values(part, [row - starts[part] for row in some])
            if classes is None:
                return found
            return [[_named(v, classes) for v in row or ()] if inner else _named(row, classes) for row in found]

        return read

    columns: dict[str, Sequence[Any]] = {column: Lazy(reader(column), rows) for column in names}
    return Table(columns, Lazy(lambda some: [f"{name} row {row + 1}" for row in some], rows))


def _class_names(feature: Any) -> tuple[bool, list[str] | None]:
    """Whether a column holds lists, and the names of the classes that its numbers stand for; None for no classes."""
    if not isinstance(feature, dict):
        return False, None
    inner = feature.get("feature")
    if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
        return True, inner["names"]
    return False, feature["names"] if feature.get("_type") == "ClassLabel" else None


def _named(value: int | None, names: list[str]) -> str | None:
    """The class of a number; -1 is how `datasets` writes a missing one."""
    return names[value] if value is not None and 0 <= value < len(names) else None


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")


def _missing(name: str) -> MissingDependency:
    return MissingDependency(f'Reading {name} needs pyarrow and datasets: pip install "smidgen[text]"')
