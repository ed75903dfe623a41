"""Split rows into training and validation, and take a smaller sample: by class, by seed, and never through a group."""

import hashlib
import random
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from smidgen.core.errors import DataError, require

_QUANTILES = 10
_MANY = 1 << 14  # texts


def split(
    n: int,
    *,
    labels: Sequence[Any] | None = None,
    groups: Sequence[Hashable] | None = None,
    fraction: float = 0.2,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation rows, each ascending; `fraction` of the rows are for validation.

    labels: one a row; each class keeps its share on both sides, floats by tenths of their range of ranks.
    groups: one a row; rows of one group stay together.  `duplicate_groups(texts)` keeps equal texts together.
    A group counts for the rarest class in it.  Every class with two groups or more is on both sides; a class with one
    group is in training.   Raises DataError if there is nothing to put on one of the sides.
    """
    require(0 < fraction < 1, f"fraction is {fraction}; a share of the rows lies between 0 and 1")
    strata = _strata(labels, n)
    group_of = range(n) if groups is None else _numbered(groups)
    count = 1 + max(group_of, default=-1)
    sizes, members = Counter(strata), [0] * count
    rarest: list[Hashable] = [None] * count
    for group, stratum in zip(group_of, strata, strict=True):
        if not members[group] or sizes[stratum] < sizes[rarest[group]]:
            rarest[group] = stratum
        members[group] += 1
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for group, stratum in enumerate(rarest):
        by_class[stratum].append(group)
    generator = random.Random(seed)
    held = bytearray(count)  # groups for validation
    owed = 0.0  # rows for validation that rounding has left to the classes that follow
    for candidates in by_class.values():
        rows = sum(members[group] for group in candidates)
        owed += fraction * rows
        if len(candidates) > 1:
            generator.shuffle(candidates)
            for group in _take(candidates, members, min(max(round(owed), 1), rows - 1)):
                held[group] = 1
                owed -= members[group]
    if not any(held):
        raise DataError(
            f"{n} rows ({count} different) cannot be split into training and validation. "
            "More rows are needed, or a validation file."
        )
    sides: tuple[list[int], list[int]] = [], []
    for i, group in enumerate(group_of):
        sides[held[group]].append(i)
    return sides


def subset(n: int, labels: Sequence[Any] | None, size: int, seed: int) -> list[int]:
    """Indices of `size` rows, ascending, with the classes in their proportions; all rows if there are no more.

    Every class is there as long as `size` is at least the number of classes.
    """
    require(size > 0, f"size is {size}; a subset has at least 1 row")
    if size >= n:
        return list(range(n))
    generator = random.Random(seed)
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for i, stratum in enumerate(_strata(labels, n)):
        by_class[stratum].append(i)
    for rows in by_class.values():
        generator.shuffle(rows)
    # row k of a class of m stands at (k + 1/2) / m: taking rows in this order keeps the proportions
    # and the first row of each class stands before all; no class gives more than `size`
    ranked = [
        (k > 0, (k + 0.5) / len(rows), i) for rows in by_class.values() for k, i in enumerate(rows[: max(size, 1)])
    ]
    if size < len(by_class):
        ranked = [(False, generator.random(), i) for _, _, i in ranked]
    return sorted(i for _, _, i in sorted(ranked)[:size])


def duplicate_groups(texts: Sequence[str]) -> list[int]:
    """A group number per row, the same for texts that differ in upper and lower case or white space only.

    Of many texts 8 bytes each are compared, and none is kept.
    """
    plain = (" ".join(text.split()).casefold() for text in texts)
    if len(texts) < _MANY:
        return list(_numbered(plain))
    return list(_numbered(array("q", map(_digest, plain))))


def rows_seen(train: Iterable[Hashable], test: Sequence[Hashable]) -> int:
    """How many rows of a test set stand in the training rows too; these may be many, and are gone through once."""
    wanted = set(test)
    seen = {row for row in train if row in wanted}
    return sum(row in seen for row in test)


def _digest(text: str) -> int:
    data = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def _numbered(values: Iterable[Hashable]) -> "array[int]":
    """A number per value, the same for equal ones, from 0 as they come."""
    if isinstance(values, array | list) and len(values) >= _MANY and all(type(value) is int for value in values):
        same = torch.unique(torch.tensor(values), return_inverse=True)[1]  # a tenth of what a dictionary would take
        first = torch.full((int(same.max()) + 1,), len(same)).scatter_reduce_(0, same, torch.arange(len(same)), "amin")
        return array("q", first.argsort().argsort()[same].numpy().tobytes())
    numbers: dict[Hashable, int] = {}
    return array("q", (numbers.setdefault(value, len(numbers)) for value in values))


def _take(candidates: list[int], members: list[int], target: int) -> list[int]:
    """Groups of `target` rows at most; the smallest if none is small enough."""
    taken, rows = list[int](), 0
    for group in candidates:
        if rows + members[group] <= target:
            taken.append(group)
            rows += members[group]
    return taken or [min(candidates, key=members.__getitem__)]


def _strata(labels: Sequence[Any] | None, n: int) -> list[Hashable]:
    """The class of each row: a label, the set of labels as a tuple, or which tenth of the numbers it is in."""
    if labels is None:
        return [0] * n
    if all(isinstance(label, float) for label in labels):
        ordered = sorted(labels)
        bins = max(1, min(_QUANTILES, n // _QUANTILES))
        edges = [ordered[n * k // bins] for k in range(1, bins)]
        return [bisect_left(edges, label) for label in labels]
    same: dict[Hashable, Hashable] = {}  # each once: of rows that are not in memory every label is a new string
    strata = (tuple(label) if isinstance(label, list) else label for label in labels)
    return [same.setdefault(stratum, stratum) for stratum in strata]
