"""What users took while training: their histories, what is popular, and the numbers that a row is judged by."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ...data.interactions import Histories
from ..base import Batch, Examples
from .catalogue import Catalogue
from .recommenders import SIDES

HEAD, TAIL, NEW = range(3)  # kinds of items
_HEAD = 0.2  # the share of items, by popularity, that is called the head
_KEPT = 200_000  # interactions, the newest, that are written into a result


class Taken:
    """The base's interactions and those that were learned from: they are not recommended again.

    pairs: rows of the catalogue, user and item.   kinds: of each item, HEAD, TAIL or NEW.
    """

    def __init__(self, catalogue: Catalogue, pairs: Sequence[tuple[int, int]], times: Sequence[float]) -> None:
        before = catalogue.known.interactions.tolist()
        self.catalogue, self.learned = catalogue, sorted(zip(times, pairs, strict=True))
        users, items = [user for user, _ in (*before, *pairs)], [item for _, item in (*before, *pairs)]
        self.histories = Histories(users, items, [*[-math.inf] * len(before), *times])
        taken = torch.tensor(items, dtype=torch.int64)
        self.counts = torch.bincount(taken, minlength=len(catalogue.rows["item"]))
        self.kinds = torch.full_like(self.counts, TAIL)
        popular = self.counts.argsort(descending=True, stable=True)
        self.kinds[popular[: math.ceil(_HEAD * len(self.counts))]] = HEAD
        self.kinds[len(catalogue.known.items) :] = NEW

    def pairs(self) -> Tensor:
        """(M, 2): users and items of all interactions."""
        return torch.tensor([*self.catalogue.known.interactions.tolist(), *(pair for _, pair in self.learned)])

    def by_popularity(self, users: Sequence[int], items: Sequence[int]) -> list[int]:
        """Twice the rank of each item for its user, if all were recommended what is taken most."""
        ordered, own = self.counts.sort().values, self.counts[list(items)]
        above = (len(ordered) - torch.searchsorted(ordered, own, right=True)).tolist()
        equal = (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own) - 1).tolist()
        counts, found = self.counts.tolist(), []
        by_user: dict[int, tuple[set[int], list[int]]] = {}  # what each took, and how often all took that, in order
        for i, (user, item) in enumerate(zip(users, items, strict=True)):
            if user not in by_user:
                taken = set(self.histories.items(user))
                by_user[user] = taken, sorted(counts[other] for other in taken)
            taken, theirs = by_user[user]
            first, after = bisect_left(theirs, counts[item]), bisect_right(theirs, counts[item])
            higher = above[i] - (len(theirs) - after)
            found.append(2 + 2 * higher + equal[i] - (after - first - (item in taken)))
        return found

    def examples(
        self, pairs: Sequence[tuple[int, int]], times: Sequence[float], counts: Sequence[bool], few: int
    ) -> Examples:
        """Rows ready for the model, with the targets of ranking/figures.py.   few: interactions of a cold user."""
        users, items = [user for user, _ in pairs], [item for _, item in pairs]
        inputs = [{"user": u, "before": self.histories.count_before(u, t)} for u, t in zip(users, times, strict=True)]
        rare = [len(self.histories.items(user)) < few for user in users]
        columns = [items, counts, self.kinds[items].tolist(), rare, self.by_popularity(users, items)]
        return Examples(inputs, torch.tensor(columns, dtype=torch.int64).T, [1] * len(pairs))

    def batch(self, examples: Examples, indices: Sequence[int], history: int) -> Batch:
        """Users with the last `history` items they took before the row, and all that they took."""
        some = [examples.inputs[i] for i in indices]
        taken = [self.histories.items(row["user"]) for row in some]
        before = [row[max(0, x["before"] - history) : x["before"]] for row, x in zip(taken, some, strict=True)]
        return {
            "users": torch.tensor([row["user"] for row in some]),
            "history": _padded(before, at_end=False),
            "taken": _padded(taken, at_end=True),
            **examples.targets_at(indices),
        }

    def describe(self) -> dict[str, str]:
        """The items of each user that were learned from, as words of numbers."""
        found = defaultdict[int, list[int]](list)
        for _, (user, item) in self.learned[-_KEPT:]:
            found[user].append(item)
        return {str(user): " ".join(map(str, items)) for user, items in found.items()}

    @classmethod
    def from_description(cls, catalogue: Catalogue, said: Mapping[str, Any]) -> Self:
        """The other way of `describe`.  Raises ValueError."""
        pairs = [(int(user), int(item)) for user, some in dict(said).items() for item in str(some).split()]
        for side, rows in zip(SIDES, zip(*pairs, strict=True), strict=False):
            if not 0 <= min(rows) <= max(rows) < len(catalogue.rows[side]):
                raise ValueError(f"an interaction is with {side} {max(rows)} of {len(catalogue.rows[side])}")
        return cls(catalogue, pairs, [float(i) for i in range(len(pairs))])


def _padded(rows: Sequence[Sequence[int]], *, at_end: bool) -> Tensor:
    """Rows of different lengths as one (N, longest), -1 where there is nothing."""
    longest = max(map(len, rows), default=0)
    filled = [[*row, *[-1] * (longest - len(row))] if at_end else [*[-1] * (longest - len(row)), *row] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), longest)
