"""Rows of whole numbers, flat: the numbers of all rows one after the other, and where each row begins.

    {"input_ids": [5, 7]}, {"input_ids": [9]}    ->    numbers [5, 7, 9], bounds [0, 2, 3]

A number in a list of Python's takes some 40 bytes, here 4; and tensors can be files that are mapped, of which only what
is used is in memory.  A row is made when it is asked for.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.data.made_rows import MadeRows

Flat = Mapping[str, tuple[Tensor, Tensor]]  # name -> numbers (M,) and bounds (rows + 1,)

_DIGESTED = 1 << 20  # numbers at once


class FlatRows(MadeRows):
    """Rows of parts that follow on each other.   rows: which of them, in which order; None for all."""

    def __init__(self, parts: Sequence[Flat], rows: Sequence[int] | None = None) -> None:
        self.parts = parts
        self._starts = list(accumulate((_count(part) for part in parts), initial=0))
        self._rows = range(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> dict[str, list[int]]:
        row = self._rows[i]
        part = bisect_right(self._starts, row) - 1
        at = row - self._starts[part]
        found = {}
        for name, (numbers, bounds) in self.parts[part].items():
            begin, end = bounds[at : at + 2].tolist()
            found[name] = numbers[begin:end].tolist()
        return found

    def select(self, indices: Sequence[int]) -> "FlatRows":
        """The rows at these places; nothing is copied."""
        return FlatRows(self.parts, array("q", (self._rows[i] for i in indices)))

    def sha256(self) -> str:
        """Of the rows, however they are cut into parts."""
        if not isinstance(self._rows, range):
            return FlatRows([flat(list(self))]).sha256()
        digests: dict[str, Any] = {}
        for part in self.parts:
            for name, (numbers, bounds) in part.items():
                for what, tensor in ((name, numbers), (f"{name} lengths", bounds.diff())):
                    digest = digests.setdefault(what, hashlib.sha256())
                    for start in range(0, len(tensor), _DIGESTED):
                        digest.update(tensor[start : start + _DIGESTED].long().numpy().tobytes())
        return hashlib.sha256(
            "".join(f"{k} {v.hexdigest()}\n" for k, v in sorted(digests.items())).encode()
        ).hexdigest()


def flat(rows: Sequence[Mapping[str, Sequence[int]]]) -> Flat:
    """Rows as tensors, in 32 bits where they fit.   rows: at least one; all have the same names."""
    return {name: _flat([row[name] for row in rows]) for name in rows[0]}


def to_tensors(part: Flat) -> dict[str, Tensor]:
    """A part as tensors with names; `from_tensors` is the other way."""
    return {f"{what}.{name}": both[i] for name, both in part.items() for i, what in enumerate(("numbers", "bounds"))}


def from_tensors(tensors: Mapping[str, Tensor]) -> Flat:
    names = [name.removeprefix("numbers.") for name in tensors if name.startswith("numbers.")]
    return {name: (tensors[f"numbers.{name}"], tensors[f"bounds.{name}"]) for name in names}


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: what is not used is not read.  It is to be one that we wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _flat(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    numbers = array("q")
    for row in rows:
        numbers.extend(row)
    bounds = torch.tensor([0, *accumulate(map(len, rows))])
    found = torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
    fits = not len(found) or -(1 << 31) <= int(found.min()) <= int(found.max()) < 1 << 31
    return (found.int() if fits else found), bounds


def _count(part: Flat) -> int:
    _, bounds = next(iter(part.values()))
    return len(bounds) - 1
