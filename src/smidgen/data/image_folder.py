"""Rows of images: folders whose names are the classes, or a table with a column of paths or bytes.

photos/cat/1.jpg, photos/dog/2.jpg ...           column "image" and column "folder", the class
photos/train/cat/1.jpg, photos/test/cat/9.jpg    the same by part; "val", "valid", "validation", "test" ...
photos/1.jpg, photos/2.jpg                       column "image" alone, to be predicted
labels.csv, train.parquet ...                    as `read_splits` reads them; paths are relative to the file
"""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from smidgen.core.errors import DataError
from smidgen.data.images import SUFFIXES, is_image
from smidgen.data.read import read_splits, split_name
from smidgen.data.table import Problem, Table

IMAGE, FOLDER = "image", "folder"
_TABLES = {".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".parquet", ".pq", ".arrow", ".feather", ".gz", ".xz"}
_SAVED = {"state.json", "dataset_dict.json"}
_ORIGIN = re.compile(r"(.+?)(:\d+| row \d+)")
_LOOKED_AT = 20  # values of a column


def read_images(where: str) -> tuple[dict[str, Table], list[Problem]]:
    """The tables at a place by part ("train", and others where they are there), and rows that cannot be read.

    Raises DataError if nothing is there.
    """
    path = Path(where).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return {"train": Table({IMAGE: [str(path)]}, [str(path)])}, []
    if path.is_dir() and not _has_table(path):
        parts, problems = _folders(path)
        if parts:
            return parts, problems
    tables, problems = read_splits(where)
    root = path if path.is_dir() else path.parent
    return {str(name): _from(root, table) for name, table in tables.items()}, problems


def _has_table(folder: Path) -> bool:
    """True if the folder, or one of the folders in it, holds a file of rows."""
    files = [entry for entry in (*folder.glob("*"), *folder.glob("*/*")) if not entry.name.startswith(".")]
    return any(file.suffix.lower() in _TABLES or file.name in _SAVED for file in files)


def _folders(root: Path) -> tuple[dict[str, Table], list[Problem]]:
    """Parts of a folder of images; none if there are no images."""
    below = _subfolders(root)
    # a class may be called "test tube": a part's folder is called by that word alone
    named = {folder: part for folder in below if folder.name.isalpha() and (part := split_name(folder.name))}
    if not named:
        rows, problems = _rows(root)
        return ({"train": rows} if rows else {}), problems
    others = [folder.name for folder in below if folder not in named and any(_images(folder))]
    if others:
        parts = ", ".join(folder.name for folder in named)
        raise DataError(
            f"{root} has folders of parts ({parts}) and others with images ({', '.join(others[:5])}). Put the classes "
            "into the parts, or rename the class that is called like a part."
        )
    tables: dict[str, Table] = {}
    problems = []
    for folder, part in named.items():
        rows, bad = _rows(folder)
        problems += bad
        if rows and part in tables:
            raise DataError(f'{root} has several folders that mean "{part}", {folder.name} among them: keep one')
        if rows:
            tables[str(part)] = rows
    return tables, problems


def _rows(folder: Path) -> tuple[Table | None, list[Problem]]:
    """Images by the folder that they are in; without classes where they lie in the folder itself."""
    loose = sorted(str(file) for file in folder.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES)
    found = [(file, sub.name) for sub in _subfolders(folder) for file in _images(sub)]
    if not found:
        return (Table({IMAGE: loose}, loose) if loose else None), []
    paths = [path for path, _ in found]
    problems = [Problem(path, "it lies beside the folders of the classes, so it has no class") for path in loose]
    return Table({IMAGE: paths, FOLDER: [name for _, name in found]}, list(paths)), problems


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _images(folder: Path) -> Iterator[str]:
    """All images at or below a folder, in order; what is hidden is left out."""
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(place, name)


def _from(root: Path, table: Table) -> Table:
    """The table with its paths of images relative to where we are, and no longer to the file they stand in."""
    places = [root / Path(match[1]).parent if (match := _ORIGIN.fullmatch(o)) else root for o in table.origins]

    def resolved(values: Sequence[Any]) -> Sequence[Any]:
        some = list(islice(((place, value) for place, value in zip(places, values, strict=True) if value), _LOOKED_AT))
        if not some or not all(isinstance(v, str) and (is_image(v) or os.path.isfile(p / v)) for p, v in some):
            return values
        return [str(p / v) if isinstance(v, str) and v else v for p, v in zip(places, values, strict=True)]

    return Table({name: resolved(values) for name, values in table.columns.items()}, table.origins)
