"""Read data from where it is: a file, a folder of files, a saved data set, or the Hugging Face hub.

    reviews.csv, .tsv, .jsonl, .ndjson, .json        also compressed, .gz or .xz
    reviews.parquet, .arrow, .feather
    folder/train.csv, folder/valid.csv ...           or folder/train/*.parquet, folder/test/*.parquet ...
    folder written by save_to_disk of `datasets`
    owner/name, owner/name:configuration             on the hub

The extension tells the format; where it says nothing, the first bytes do.  A row that cannot be read is a Problem with
its place, and the next one is read: whether bad rows are skipped or fatal is decided by who asked.

What would take more than a quarter of the free memory stays where it is (`lazy.py`): every row is checked as it would
be otherwise, and read again when it is asked for.  Only an array of JSON has to be read whole.
"""

import gzip
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch

from smidgen.core.errors import DataError, nearest
from smidgen.core.free_memory import free_memory
from smidgen.data.arrow import from_dataset, load_from_hub, load_saved, read_arrow_file
from smidgen.data.delimited import index_delimited, read_delimited
from smidgen.data.json_lines import index_json_lines, read_json_array, read_json_lines
from smidgen.data.table import Problem, Table, concatenate

Split = Literal["train", "valid", "test"]
Result = tuple[Table, list[Problem]]

_SPLIT_WORDS: dict[Split, str] = {
    "train": "train|training",
    "valid": "valid|validation|val|dev",
    "test": "test|testing|eval|evaluation",
}
_ARROW = {".parquet", ".pq", ".arrow", ".feather"}
_JSON = {".jsonl", ".ndjson", ".json"}
_DELIMITED = {".csv", ".tsv", ".tab"}
_COMPRESSED = {".gz", ".xz"}
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json"}
_TIMES = {".parquet": 20, ".pq": 20, ".gz": 25, ".xz": 30}  # what rows take in memory, in sizes of their file
_TIMES_OTHERWISE = 7
_SHARE = 1 / 4  # of the free memory, that rows may take
_in_memory: ContextVar[bool | None] = ContextVar("in_memory", default=None)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@contextmanager
def reading(in_memory: bool | None) -> Iterator[None]:
    """Whether what is read in this block is held in memory; None leaves it to its size and the free memory."""
    token = _in_memory.set(in_memory)
    try:
        yield
    finally:
        _in_memory.reset(token)


def read(source: str | Path, *, split: str | None = None) -> Result:
    """The rows of `source`, and the rows that cannot be read.

    split: which, for a source that has several ("valid", "validation", "val" and "dev" are the same).
    Raises DataError if the source is not there, is empty, has no row that can be read, or has several splits and none
    was asked for.
    """
    parts = splits(source)
    wanted = split and (split_name(split) or split)
    if wanted is None and len(parts) == 1:
        return next(iter(parts.values()))()
    for name, load in parts.items():
        if name == wanted:
            return load()
    there = ", ".join(parts)
    if wanted is None:
        raise DataError(f'{source} has several splits: {there}. Say which, for instance split="{next(iter(parts))}".')
    raise DataError(f'{source} has no split "{split}". It has: {there}.')


def read_splits(source: str | Path) -> tuple[dict[Split, Table], list[Problem]]:
    """All splits of `source` by name, and the rows of any of them that cannot be read.

    A source without split names (one file, say) is "train".   Raises DataError as `read` does.
    """
    tables: dict[Split, Table] = {}
    problems: list[Problem] = []
    for name, load in splits(source).items():
        tables[name], bad = load()
        problems += bad
    return tables, problems


def splits(source: str | Path) -> dict[Split, Callable[[], Result]]:
    """What would be read as which split, each with the function that reads it.  Raises DataError if there is none."""
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": partial(_read_files, [path], path.parent)}
    if path.is_dir():
        if any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return _dataset_splits(load_saved(path), path.name)
        return _folder_splits(path)
    first = Path(path.parts[0]) if path.parts else path
    # "data/reviews" where there is a folder data is a slip of the pen, and no reason to ask the network
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not _kind(path) and not first.exists():
        return _dataset_splits(load_from_hub(source), source)
    raise _not_there(path)


def split_name(text: str) -> Split | None:
    """The split that a file or split name speaks of ("train-00000-of-00002", "validation_matched"), if any."""
    for split, words in _SPLIT_WORDS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", text.lower()):
            return split
    return None


def _folder_splits(folder: Path) -> dict[Split, Callable[[], Result]]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and _kind(file) and file.name not in _DESCRIPTIONS
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        others = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{folder} has no data files (CSV, TSV, JSON lines, JSON, Parquet, Arrow); it holds {others}. "
            "Name them train.csv, valid.csv, test.csv, or give one file."
        )
    named: dict[Split, list[Path]] = {split: [] for split in _SPLIT_WORDS}
    for file in files:
        parts = reversed(file.relative_to(folder).parts)  # the file's own name first
        if split := next((split for part in parts if (split := split_name(part))), None):
            named[split].append(file)
    if not any(named.values()):
        named["train"] = files
    return {split: partial(_read_files, paths, folder) for split, paths in named.items() if paths}


def _dataset_splits(datasets: dict[str, object], name: str) -> dict[Split, Callable[[], Result]]:
    named: dict[Split, list[str]] = {split: [] for split in _SPLIT_WORDS}
    for key in datasets:
        if split := split_name(key):
            named[split].append(key)
    if not any(named.values()):
        named["train"] = list(datasets)

    def load(keys: list[str]) -> Result:
        parts: list[Any] = [datasets[key] for key in keys]
        lazily = _is_large(sum(part.data.nbytes for part in parts) * 3)
        tables = [from_dataset(part, f"{name}/{key}", lazily=lazily) for key, part in zip(keys, parts, strict=True)]
        return concatenate(tables), []

    return {split: partial(load, keys) for split, keys in named.items() if keys}


def _read_files(paths: Sequence[Path], folder: Path) -> Result:
    lazily = _is_large(sum(path.stat().st_size * _TIMES.get(path.suffix.lower(), _TIMES_OTHERWISE) for path in paths))
    results = [_read_file(path, path.relative_to(folder).as_posix(), lazily) for path in paths]
    return concatenate([table for table, _ in results]), [problem for _, problems in results for problem in problems]


def _is_large(needed_bytes: int) -> bool:
    """Whether rows that would take so much memory stay where they are."""
    said = _in_memory.get()
    if said is not None:
        return not said
    free = free_memory(torch.device("cpu"))
    return free is not None and needed_bytes > _SHARE * free


def _read_file(path: Path, name: str, lazily: bool) -> Result:
    """name: what the file is called where a row of it is named."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        kind = _kind(path)
        with path.open("rb") as file:
            magic = file.read(6)
        if kind in _ARROW or (not kind and (magic.startswith(b"PAR1") or magic == b"ARROW1")):
            table = read_arrow_file(path, name, lazily=lazily)
            problems: list[Problem] = []
        elif lazily:
            table, problems = _index_text(_opened(path), name, kind)
        else:
            table, problems = _read_text(_content(path), name, kind)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not len(table):
        bad = "".join(f"\n  {problem}" for problem in problems[:5])
        raise DataError(f"{path} has no row that can be read ({len(problems)} bad rows).{bad}")
    return table, problems


def _read_text(data: bytes, name: str, kind: str) -> Result:
    match _layout(data[:8192], kind):
        case "delimited":
            return read_delimited(data, name, _delimiter(kind))
        case "array":
            return read_json_array(data, name)
        case _:
            return read_json_lines(data, name)


def _index_text(file: BinaryIO, name: str, kind: str) -> Result:
    layout = _layout(file.read(8192), kind)
    file.seek(0)
    try:
        if layout == "delimited":
            return index_delimited(file, name, _delimiter(kind))
        if layout == "lines":
            return index_json_lines(file, name)
    except DataError:
        file.close()
        raise
    with file:
        return read_json_array(file.read(), name)


def _layout(start: bytes, kind: str) -> Literal["delimited", "array", "lines"]:
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind in _DELIMITED or (kind not in _JSON and first not in (b"{", b"[")):
        return "delimited"
    return "array" if first == b"[" and kind not in (".jsonl", ".ndjson") else "lines"


def _delimiter(kind: str) -> str | None:
    return "\t" if kind in (".tsv", ".tab") else None


def _opened(path: Path) -> BinaryIO:
    """The file, to be read here and there; a compressed one as it is without, in a file without a name."""
    file = path.open("rb")
    magic = file.read(6)
    file.seek(0)
    unpack = gzip.open if magic.startswith(b"\x1f\x8b") else lzma.open if magic == b"\xfd7zXZ\x00" else None
    if unpack is None:
        return file
    with ExitStack() as closing, file, _undamaged(path), unpack(file) as packed:
        whole = closing.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(cast(BinaryIO, packed), whole, 1 << 20)
        whole.seek(0)
        closing.pop_all()  # it goes with the table
    return cast(BinaryIO, whole)


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is compressed and damaged: {error}") from None


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    with _undamaged(path):
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"\xfd7zXZ\x00"):
            return lzma.decompress(data)
    return data


def _kind(path: Path) -> str:
    """The extension that tells the format, ".csv" for "reviews.csv.gz"; "" if none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _ARROW | _JSON | _DELIMITED else ""


def _not_there(path: Path) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(f'There is no file or folder "{path}", nor the folder {parent}.')
    there = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = nearest(path.name, there) or [name for name in there if _kind(Path(name))][:5]
    hint = f" Near it: {', '.join(str(parent / name) for name in near)}." if near else ""
    return DataError(
        f'There is no file or folder "{path}".{hint} A data set of the Hugging Face hub is written "owner/name".'
    )
