"""What users took while training: their histories, what is popular, and the numbers that a row is judged by."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ...data.interactions import Histories
from .catalogue import Catalogue
from .recommenders import SIDES

HEAD, TAIL, NEW = range(3)  # kinds of items
_HEAD = 0.2  # the share of items, by popularity, that is called the head
_KEPT = 200_000  # interactions, the newest, that are written into a result


class Taken:
    """The base's interactions and those that were learned from: they are not recommended again.

    users, items: rows of the catalogue.   kinds: of each item, HEAD, TAIL or NEW.
    """

    def __init__(
        self, catalogue: Catalogue, users: Sequence[int], items: Sequence[int], times: Sequence[float]
    ) -> None:
        before = catalogue.known.interactions
        old_users, old_items = before[:, 0].tolist(), before[:, 1].tolist()
        self.catalogue, self.learned = catalogue, sorted(zip(times, users, items, strict=True))
        self.histories = Histories([*old_users, *users], [*old_items, *items], [*[-math.inf] * len(before), *times])
        taken = torch.tensor([*old_items, *items], dtype=torch.int64)
        self.counts = torch.bincount(taken, minlength=len(catalogue.rows["item"]))
        self.kinds = torch.full_like(self.counts, TAIL)
        popular = self.counts.argsort(descending=True, stable=True)
        self.kinds[popular[: math.ceil(_HEAD * len(self.counts))]] = HEAD
        self.kinds[len(catalogue.known.items) :] = NEW

    def pairs(self) -> Tensor:
        """(M, 2): users and items of all interactions."""
        learned = [(user, item) for _, user, item in self.learned]
        return torch.tensor([*self.catalogue.known.interactions.tolist(), *learned])

    def by_popularity(self, users: Sequence[int], items: Sequence[int]) -> list[int]:
        """Twice the rank of each item for its user, if all were recommended what is taken most."""
        ordered, own = self.counts.sort().values, self.counts[list(items)]
        above = (len(ordered) - torch.searchsorted(ordered, own, right=True)).tolist()
        equal = (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own) - 1).tolist()
        counts, found = self.counts.tolist(), []
        for i, (user, item) in enumerate(zip(users, items, strict=True)):
            taken = [counts[other] for other in set(self.histories.items(user)) - {item}]
            higher = above[i] - sum(count > counts[item] for count in taken)
            found.append(2 + 2 * higher + equal[i] - sum(count == counts[item] for count in taken))
        return found

    def describe(self) -> dict[str, str]:
        """The items of each user that were learned from, as words of numbers."""
        found = defaultdict[int, list[int]](list)
        for _, user, item in self.learned[-_KEPT:]:
            found[user].append(item)
        return {str(user): " ".join(map(str, items)) for user, items in found.items()}

    @classmethod
    def from_description(cls, catalogue: Catalogue, said: Mapping[str, Any]) -> Self:
        """The other way of `describe`.  Raises ValueError."""
        pairs = [(int(user), int(item)) for user, some in dict(said).items() for item in str(some).split()]
        users, items = [user for user, _ in pairs], [item for _, item in pairs]
        for side, rows in zip(SIDES, (users, items), strict=True):
            if rows and not 0 <= min(rows) <= max(rows) < len(catalogue.rows[side]):
                raise ValueError(f"an interaction is with {side} {max(rows)} of {len(catalogue.rows[side])}")
        return cls(catalogue, users, items, [float(i) for i in range(len(pairs))])
