"""Rows made ready for the model, a part at a time: flat in memory, or on disk under a key of all that they follow from.

A task says what its rows follow from (`Task.encoding`).  What would take long to encode is kept in the cache: it is
found there by the next run, by a resumed one, and by the other processes of this one.  Rows that do not fit in memory
are on disk in any case, without a cache in a folder that goes with the run.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..core.errors import DataError
from ..core.safe import write_tensors
from ..data.cache import Cache, State, default_folder
from ..data.flat_rows import FlatRows, flat, from_tensors, mapped_tensors, to_tensors
from ..data.table import FEW, Table
from ..tasks.base import Encoding, Examples, Task

_ENCODING = 1  # counts up when the same rows are encoded otherwise than by an earlier version
_WORTH_BYTES = 8 << 20  # of text; encoding less takes a few seconds
_SAMPLE = 1000  # rows measured for their size
_PART_BYTES = 16 << 20  # of text that is encoded at once
_FILE_BYTES = 64 << 20  # of encoded rows, that are written together
_NAMES = {"found": "found there", "made": "kept for the next run", "mended": "were damaged there, and are made anew"}


@dataclass
class Encoder:
    """Encodes tables of a run.   said: "off", a folder, or None: the usual folder, where encoding takes long."""

    said: str | None = None
    done: list[tuple[State, int]] = field(default_factory=list)  # what came of it, and for how many rows
    wrong: str | None = None  # why nothing could be kept

    @property
    def folder(self) -> Path:
        """Where rows are kept."""
        return Path(self.said).expanduser() if self.said not in (None, "off") else default_folder() / "rows"

    def __call__(self, task: Task, table: Table) -> Examples:
        """The rows of a table; raises what the task's `encode` raises."""
        how = task.encoding() if _says_how(type(task)) else None
        if how is None or not len(table):
            return task.encode(table)
        columns = [name for name in how.columns if name in table.columns]
        lasting = self.said != "off" and (table.is_lazy or self.said or _size(table, columns) >= _WORTH_BYTES)
        if lasting:
            try:
                path, state = Cache(self.folder).entry(_key(task, table, columns, how), _Writer(task, table, columns))
                self.done.append((state, len(table)))
                return _read(task, table, path, how)
            except OSError as error:  # the disk is full, or not ours: it goes without
                self.wrong = f"{self.folder} cannot be written: {error.strerror or error}"
        if not table.is_lazy:
            return _whole(task, table, list(_parts(task, table, columns)), how)
        folder = Path(tempfile.mkdtemp(prefix="smidgen-rows-"))
        try:
            _Writer(task, table, columns)(folder)
            examples = _read(task, table, folder, how)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise DataError(f"the rows do not fit in memory, and {folder} cannot be written: {error}") from None
            raise
        weakref.finalize(examples.inputs, shutil.rmtree, folder, ignore_errors=True)
        return examples

    def in_words(self) -> tuple[str, str] | None:
        """Where the rows are kept and what came of it, if anything was to be kept."""
        if not self.done:
            return ("off", self.wrong) if self.wrong else None
        counts = {state: sum(rows for found, rows in self.done if found == state) for state, _ in self.done}
        return str(self.folder), "; ".join(f"{rows:,} encoded rows: {_NAMES[state]}" for state, rows in counts.items())


@dataclass(frozen=True)
class _Writer:
    """Writes the encoded rows of a table into a folder: files of many parts, named by their number."""

    task: Task
    table: Table
    columns: Sequence[str]

    def __call__(self, folder: Path) -> None:
        waiting: dict[str, Tensor] = {}
        number = 0
        for part in _parts(self.task, self.table, self.columns):
            waiting |= {f"{number} {name}": tensor for name, tensor in part.items()}
            number += 1
            if sum(tensor.nbytes for tensor in waiting.values()) >= _FILE_BYTES:
                write_tensors(folder / f"{number:08}.safetensors", waiting)
                waiting = {}
        write_tensors(folder / f"{number:08}.safetensors", waiting)


def _parts(task: Task, table: Table, columns: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The rows encoded a part at a time, each as if it were a table, as tensors; parts without rows are left out.

    Parts follow from the rows alone: they are the same in memory and on disk.
    """
    together = min(max(1, int(_PART_BYTES * len(table) / max(1, _size(table, columns)))), FEW)
    for start in range(0, len(table), together):
        part = task.encode(table.select(range(start, min(start + together, len(table)))))
        if len(part):
            beside = {"targets": part.targets, "lengths": torch.tensor(part.lengths)}
            if part.weights is not None:
                beside["weights"] = part.weights
            yield {**to_tensors(flat(part.inputs)), **beside, "truncated": torch.tensor(part.truncated)}


def _read(task: Task, table: Table, folder: Path, how: Encoding) -> Examples:
    parts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in mapped_tensors(file).items():
            number, _, what = name.partition(" ")
            parts[int(number)][what] = tensor
    return _whole(task, table, [part for _, part in sorted(parts.items())], how)


def _whole(task: Task, table: Table, parts: Sequence[dict[str, Tensor]], how: Encoding) -> Examples:
    """The parts as one, and what follows from all rows at once."""
    if not parts:
        return task.encode(table)  # nothing is left of the rows, and the task says so
    wide = max(part["targets"].shape[-1] if part["targets"].ndim > 1 else 0 for part in parts)
    targets = [
        F.pad(part["targets"], (0, wide - part["targets"].shape[-1]), value=how.filler) if wide else part["targets"]
        for part in parts
    ]
    lengths = [length for part in parts for length in part["lengths"].tolist()]
    inputs = FlatRows([from_tensors(part) for part in parts])
    cut = sum(int(part["truncated"]) for part in parts)
    weights = torch.cat([part["weights"] for part in parts]) if "weights" in parts[0] else None
    return task.complete(table, Examples(inputs, torch.cat(targets), lengths, cut, weights))


def _size(table: Table, columns: Sequence[str]) -> float:
    """Characters in these columns, by a sample."""
    some = [value for name in columns for value in table.columns[name][:_SAMPLE]]
    return sum(len(value if isinstance(value, str) else str(value)) for value in some) * max(1, len(table) / _SAMPLE)


def _says_how(kind: type[Task]) -> bool:
    """False where a class has its own `encode` and the class above it said what that follows from."""
    return next("encoding" in vars(each) for each in kind.__mro__ if {"encode", "encoding"} & vars(each).keys())


def _key(task: Task, table: Table, columns: Sequence[str], how: Encoding) -> str:
    """Of all that the encoded rows follow from, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    kind, tokenizer = type(task), getattr(task, "tokenizer", None)
    about = {
        "encoding": [_ENCODING, __version__, FEW],
        "task": f"{kind.__module__}.{kind.__qualname__}",
        "settings": how.settings,
        "columns": columns,
    }
    if tokenizer is not None:
        about["tokenizer"] = tokenizer_sha256(tokenizer)
        about["packages"] = [version(package) for package in ("tokenizers", "transformers")]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for values in zip(*(table.columns[name] for name in columns), strict=True):
        for value in values:
            data = (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
            digest.update(b"%c%d:" % (b"s" if isinstance(value, str) else b"v", len(data)) + data)
    return digest.hexdigest()[:32]


def tokenizer_sha256(tokenizer: Any) -> str:
    """Of a tokenizer's files as it would save them, but for how far it cut and padded last."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            data = file.read_bytes()
            if file.name == "tokenizer.json":
                data = json.dumps({**json.loads(data), "truncation": None, "padding": None}, sort_keys=True).encode()
            digest.update(f"{file.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()
