"""Rows that are made when they are asked for: selected without being made, and with a digest of their own."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self, overload


class MadeRows(Sequence[Mapping[str, Any]]):
    """Rows ready for the model, of which only those in use are in memory."""

    @abstractmethod
    def row(self, i: int) -> Mapping[str, Any]:
        """Row i, 0 <= i < len(self), made now."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> Self:
        """The rows at these places; none is made."""

    @abstractmethod
    def sha256(self) -> str:
        """Of all that the rows follow from: where it is the same, they are."""

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Self:
        places = range(len(self))[index]
        return self.row(places) if isinstance(places, int) else self.select(places)
