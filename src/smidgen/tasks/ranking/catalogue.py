"""Who the users and items are: the rows of a recommender, the new ones behind them, and the features of these."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from .recommenders import SIDES, Known, Side

Words = Mapping[Side, Mapping[str, Sequence[str]]]  # of each side and name, its features


class Catalogue:
    """Names and row numbers of all users and items.   new: the names behind the base's.

    features: of each new row, which of the base's columns of features are 1.   words: the features of every row, where
    it was `grown` by them.   Raises ValueError for a name twice.
    """

    words: Mapping[Side, Sequence[Sequence[str]]]

    def __init__(
        self, known: Known, new: Mapping[Side, Sequence[str]], features: Mapping[Side, Sequence[Sequence[int]]]
    ) -> None:
        self.known, self.new = known, {side: list(new[side]) for side in SIDES}
        self.features = {side: [list(some) for some in features[side]] for side in SIDES}
        self.names = {side: [*known.names(side), *new[side]] for side in SIDES}
        self.rows = {side: {name: i for i, name in enumerate(self.names[side])} for side in SIDES}
        if any(len(self.rows[side]) < len(self.names[side]) for side in SIDES):
            raise ValueError("a new user or item is named twice, or is not new")

    @classmethod
    def grown(cls, known: Known, found: Mapping[Side, Sequence[str]], words: Words) -> Self:
        """The catalogue that has these names too."""
        new, features = dict[Side, list[str]](), dict[Side, list[list[int]]]()
        for side in SIDES:
            old, place = set(known.names(side)), {word: i for i, word in enumerate(known.feature_names(side))}
            new[side] = [name for name in dict.fromkeys(found[side]) if name and name not in old]
            features[side] = [
                sorted({place[word] for word in words[side].get(name, ()) if word in place}) for name in new[side]
            ]
        made = cls(known, new, features)
        made.words = {side: [words[side].get(name, ()) for name in made.names[side]] for side in SIDES}
        return made

    def what_is_new(self, side: Side, found: Sequence[str]) -> tuple[str, str]:
        """How many users or items are new, and among how many.   found: those of the training rows."""
        new, there, old = len(self.new[side]), len(set(found)), len(self.known.names(side))
        return f"{new:,}", f"{there - new:,} of {there:,} in training are among the base's {old:,}"

    def values(self) -> dict[Side, Tensor]:
        """The features of the new rows, (n, F) 0 or 1."""
        values: dict[Side, Tensor] = {}
        for side in SIDES:
            values[side] = torch.zeros(len(self.new[side]), len(self.known.feature_names(side)))
            for i, some in enumerate(self.features[side]):
                values[side][i, some] = 1.0
        return values

    def describe(self) -> dict[str, Any]:
        # features are words of numbers: a line each in the file, and not one for each number
        words = {side: [" ".join(map(str, some)) for some in self.features[side]] for side in SIDES}
        return {"new": self.new, "features": words}

    @classmethod
    def from_description(cls, known: Known, description: Mapping[str, Any]) -> Self:
        """The other way of `describe`.  Raises KeyError, TypeError or ValueError."""
        new = {side: [str(name) for name in description["new"][side]] for side in SIDES}
        features = {side: [[*map(int, str(some).split())] for some in description["features"][side]] for side in SIDES}
        return cls(known, new, features)
