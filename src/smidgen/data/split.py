"""Split rows into training and validation, and take a smaller sample: by class, by seed, and never through a group."""

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from smidgen.core.errors import DataError, require

_QUANTILES = 10


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
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i in range(n):
        members[groups[i] if groups is not None else i].append(i)
    sizes = Counter(strata)
    by_class: dict[Hashable, list[list[int]]] = defaultdict(list)
    for rows in members.values():
        rarest = min((strata[i] for i in rows), key=lambda stratum: sizes[stratum])
        by_class[rarest].append(rows)
    generator = random.Random(seed)
    valid: list[int] = []
    owed = 0.0  # rows for validation that rounding has left to the classes that follow
    for candidates in by_class.values():
        count = sum(map(len, candidates))
        owed += fraction * count
        if len(candidates) > 1:
            generator.shuffle(candidates)
            taken = _take(candidates, min(max(round(owed), 1), count - 1))
            owed -= len(taken)
            valid += taken
    held = set(valid)
    if not held:
        raise DataError(
            f"{n} rows ({len(members)} different) cannot be split into training and validation. "
            "More rows are needed, or a validation file."
        )
    return [i for i in range(n) if i not in held], sorted(held)


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
    # and the first row of each class stands before all
    ranked = [(k > 0, (k + 0.5) / len(rows), i) for rows in by_class.values() for k, i in enumerate(rows)]
    if size < len(by_class):
        ranked = [(False, generator.random(), i) for _, _, i in ranked]
    return sorted(i for _, _, i in sorted(ranked)[:size])


def duplicate_groups(texts: Sequence[str]) -> list[int]:
    """A group number per row, the same for texts that differ in upper and lower case or white space only."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(" ".join(text.split()).casefold(), len(numbers)) for text in texts]


def _take(candidates: list[list[int]], target: int) -> list[int]:
    """Rows of whole groups, `target` at most; of the smallest group if none is small enough."""
    taken: list[int] = []
    for rows in candidates:
        if len(taken) + len(rows) <= target:
            taken += rows
    return taken or min(candidates, key=len)


def _strata(labels: Sequence[Any] | None, n: int) -> list[Hashable]:
    """The class of each row: a label, the set of labels as a tuple, or which tenth of the numbers it is in."""
    if labels is None:
        return [0] * n
    if all(isinstance(label, float) for label in labels):
        ordered = sorted(labels)
        bins = max(1, min(_QUANTILES, n // _QUANTILES))
        edges = [ordered[n * k // bins] for k in range(1, bins)]
        return [bisect_left(edges, label) for label in labels]
    return [tuple(label) if isinstance(label, list) else label for label in labels]
