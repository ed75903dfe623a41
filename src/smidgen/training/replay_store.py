"""Store: per row of some sets of examples, what the units of a cut gave; in memory, or mapped from files.

    FOLDER/train.rows    the batches as they were recorded, one tensor per unit, each beginning at a multiple of 64
    FOLDER/train.json    written when all rows are there: fingerprint, sha256, and where each batch begins

A file without its note, with another fingerprint, or not as it was written, is recorded again.
"""

import json
import math
import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.errors import FolderError
from ..core.files import atomic_write, sha256_file
from ..core.free_memory import free_memory
from ..core.safe import DTYPES, NAMES, read_json

_VERSION = 1
_ALIGNED = 64  # bytes
_OF_MEMORY, _OF_DISK = 4, 2  # a quarter of what is free, a half
_UNKNOWN = 4 << 30  # bytes taken to be free where the system does not tell
_MAX_NOTE_BYTES = 256 << 20


class Store:
    """What was kept of sets of examples, by name.   sizes: how many rows each has.

    dtype: what is kept is rounded to it; None keeps it as it was computed.   device: where, in memory.
    limit_bytes: of all together; a set that would go beyond it is given up, and its rows are computed.
    folder: files instead of memory.   fingerprint: of all that the numbers follow from.   notes: what was damaged.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        limit_bytes: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        folder: Path | None = None,
        fingerprint: str = "",
    ) -> None:
        self.dtype, self.limit_bytes, self.folder, self.fingerprint = dtype, limit_bytes, folder, fingerprint
        self.size_bytes, self.notes = 0, list[str]()
        self._sizes = dict(sizes)
        self._places: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in sizes}  # row: batch, place in it
        self._batches: dict[str, _Batches] = {}
        for name in sizes:
            if folder is None:
                self._batches[name] = _InMemory(device or torch.device("cpu"))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                self._batches[name] = self._found(name, folder) or _InFile(folder / f"{name}.rows")

    def takes(self, name: str) -> bool:
        """True if the set is one of those that are kept."""
        return name in self._places

    def has(self, name: str, rows: Sequence[int]) -> bool:
        """True if all these rows are there."""
        return name in self._places and all(row in self._places[name] for row in rows)

    def is_whole(self, name: str) -> bool:
        """True if all rows of the set are there."""
        return name in self._places and len(self._places[name]) == self._sizes[name]

    def put(self, name: str, rows: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Keep what the units gave for these rows, each (sides x rows, ...)."""
        parts = [tensor.to(self.dtype or tensor.dtype) for tensor in outputs]
        size = sum(part.nbytes for part in parts)
        if self.size_bytes + size > self.limit_bytes:
            return self.give_up(name)
        try:
            self._batches[name].append([part.reshape(-1, len(rows), *part.shape[1:]) for part in parts])  # (S, B, ...)
        except OSError:  # the disk is full
            return self.give_up(name)
        number, places = len(self._batches[name]) - 1, self._places[name]
        places.update({row: (number, place) for place, row in enumerate(rows) if row not in places})
        self.size_bytes += size
        if self.is_whole(name):
            self._batches[name].finish(self.fingerprint, places)

    def get(self, name: str, unit: int, rows: Sequence[int]) -> list[Tensor]:
        """Of each row what this unit gave, (S, ...), as long as it was in the batch in which it was recorded."""
        batches, places = self._batches[name], self._places[name]
        return [batches.tensor(places[row][0], unit)[:, places[row][1]] for row in rows]

    def give_up(self, name: str) -> None:
        """Let go of a set; its rows are computed from now on."""
        self._batches.pop(name).remove()
        del self._places[name]

    def _found(self, name: str, folder: Path) -> "_InFile | None":
        """The set in its file, if that is whole and of this fingerprint; else what there is of it goes."""
        path, note = folder / f"{name}.rows", folder / f"{name}.json"
        try:
            said = read_json(note, max_bytes=_MAX_NOTE_BYTES)
            if said.get("version") != _VERSION or said.get("fingerprint") != self.fingerprint:
                raise FolderError(f"{path} is of other rows, another model or another version")
            if sha256_file(path) != said["sha256"]:
                raise FolderError(f"{path} is not as it was written")
            entries = [[(int(begin), str(dtype), list(shape)) for begin, dtype, shape in b] for b in said["batches"]]
            self._places[name] = {row: (batch, place) for row, batch, place in said["rows"]}
            self.size_bytes += path.stat().st_size
            return _InFile(path, entries)
        except (FolderError, OSError, KeyError, TypeError, ValueError) as error:
            if note.exists():
                self.notes.append(f"{error}; recorded again")
        for left in (path, note):
            left.unlink(missing_ok=True)
        return None


class _Batches(Protocol):
    def __len__(self) -> int: ...
    def append(self, parts: list[Tensor]) -> None: ...
    def tensor(self, batch: int, unit: int) -> Tensor: ...
    def finish(self, fingerprint: str, places: Mapping[int, tuple[int, int]]) -> None: ...
    def remove(self) -> None: ...


class _InMemory:
    def __init__(self, device: torch.device) -> None:
        self.device, self.parts = device, list[list[Tensor]]()

    def __len__(self) -> int:
        return len(self.parts)

    def append(self, parts: list[Tensor]) -> None:
        self.parts.append([part.to(self.device) for part in parts])

    def tensor(self, batch: int, unit: int) -> Tensor:
        return self.parts[batch][unit]

    def finish(self, fingerprint: str, places: Mapping[int, tuple[int, int]]) -> None:
        """Nothing is left to do."""

    def remove(self) -> None:
        self.parts.clear()


class _InFile:
    """entries: per batch and unit where its bytes begin, the dtype's name, the shape."""

    def __init__(self, path: Path, entries: list[list[tuple[int, str, list[int]]]] | None = None) -> None:
        self.path, self.entries, self.map = path, entries or [], mmap.mmap(-1, 1)

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, parts: list[Tensor]) -> None:
        """Raises OSError if the disk is full."""
        found = []
        with open(self.path, "ab") as file:
            for part in parts:
                file.write(bytes(-file.tell() % _ALIGNED))
                found.append((file.tell(), NAMES[part.dtype], list(part.shape)))
                file.write(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.entries.append(found)

    def tensor(self, batch: int, unit: int) -> Tensor:
        begin, dtype, shape = self.entries[batch][unit]
        count = math.prod(shape)
        if len(self.map) < begin + count * DTYPES[dtype].itemsize:  # it has grown since
            with open(self.path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self.map, dtype=DTYPES[dtype], count=count, offset=begin).view(shape)

    def finish(self, fingerprint: str, places: Mapping[int, tuple[int, int]]) -> None:
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        note: dict[str, Any] = {"version": _VERSION, "fingerprint": fingerprint, "sha256": sha256_file(self.path)}
        note |= {"rows": [[row, *place] for row, place in places.items()], "batches": self.entries}
        atomic_write(self.path.with_suffix(".json"), json.dumps(note).encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)


def room_in_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a store may take: a quarter of what is free, on the CPU shared by the processes of this machine."""
    free = free_memory(device)
    free = _UNKNOWN if free is None else free
    return free // _OF_MEMORY // (1 if device.type == "cuda" else processes)


def room_on_disk(folder: Path, processes: int = 1) -> int:
    """Bytes that a store may take: half of what is free where the folder is, or would be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free // _OF_DISK // processes
