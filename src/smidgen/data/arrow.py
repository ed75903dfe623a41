"""Parquet and Arrow files, saved data set folders and data sets of the Hugging Face hub: all are Arrow tables inside.

Numbers that stand for named classes (the `ClassLabel` of `datasets`) become their names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smidgen.core.errors import DataError, MissingDependency
from smidgen.data.table import Table

# builders of `datasets` that read plain tables; others unpack archives and decode what is in them
_TABLE_BUILDERS = {"arrow", "cache", "csv", "json", "parquet", "text"}


def read_arrow_file(path: Path, name: str) -> Table:
    """A Parquet file, or an Arrow file of either layout (with a footer, or a stream).  Raises DataError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing(name) from None
    try:
        with path.open("rb") as file:
            magic = file.read(6)
            file.seek(0)
            if magic.startswith(b"PAR1"):
                table = pyarrow.parquet.read_table(file)
            elif magic == b"ARROW1":
                table = pyarrow.ipc.open_file(file).read_all()
            else:
                table = pyarrow.ipc.open_stream(file).read_all()
            columns = table.to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read as Parquet or Arrow; it may be cut short: {error}") from None
    described = (table.schema.metadata or {}).get(b"huggingface")
    features = json.loads(described)["info"]["features"] if described else {}
    columns = {column: values for column, values in columns.items() if not column.startswith("__index_level_")}
    return _table(columns, features, name)


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


def from_dataset(dataset: Any, name: str) -> Table:
    """A `datasets.Dataset` as a Table."""
    return _table(dataset.with_format("arrow")[:].to_pydict(), dataset.features.to_dict(), name)


def _table(columns: dict[str, list[Any]], features: dict[str, Any], name: str) -> Table:
    for column in features.keys() & columns.keys():
        inner, names = _class_names(features[column])
        if names is not None:
            values = columns[column]
            columns[column] = (
                [[_named(v, names) for v in row or ()] for row in values]
                if inner
                else [_named(v, names) for v in values]
            )
    count = max(map(len, columns.values()), default=0)
    return Table(columns, [f"{name} row {row}" for row in range(1, count + 1)])


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
