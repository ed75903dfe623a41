"""Columns that stay where they are and are read when they are asked for, so that a table may be larger than memory.

A lazy column is a function that reads some rows of a file, and the numbers of the rows that it has.  Going through it
reads a block at a time; one value out of turn is read alone.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import accumulate, groupby
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
Read = Callable[[Sequence[int]], list[Any]]  # row numbers -> their values

_TOGETHER = 1 << 12  # rows read at once, fewer where they are long
_FIRST = 16  # rows read before it is known how long they are
_CHARACTERS = 1 << 22  # or bytes, that they may have
_LONG = 64  # characters of a string that is not kept in memory
_DIFFERENT = 1 << 12  # values of a column that is kept in memory


class Lazy(Sequence[Any]):
    """Values read when they are asked for.   rows: what `read` is given for each of them."""

    def __init__(self, read: Read, rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows
        self._first, self._block = 0, list[Any]()  # the values read last, from which place on
        self._together = _FIRST

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        """Equal to whatever has the same values in order."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Sequence[int]) -> list[Any]:
        """The values at these places, in memory."""
        return self.read([self.rows[i] for i in indices])

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        i = range(len(self))[index]
        after = self._first + len(self._block)
        if i == after:  # somebody goes through it
            self._first, self._block = i, self._from(i)
        elif not self._first <= i < after:
            return self.take([i])[0]
        return self._block[i - self._first]

    def __iter__(self) -> Iterator[Any]:
        start = 0
        while start < len(self):
            block = self._from(start)
            start += len(block)
            yield from block

    def _from(self, start: int) -> list[Any]:
        """The next values from here on, as many as have a fair size together."""
        block = self.take(range(start, min(start + self._together, len(self))))
        long = sum(map(_length, block))
        self._together = min(max(1, _CHARACTERS * len(block) // max(1, long)), _TOGETHER)
        return block


def _length(value: Any) -> int:
    """About how many characters or bytes a value has; that of a dict is what it holds, as the bytes of an image."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return len(value) if isinstance(value, Sized) else 1


def picked(columns: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, Sequence[Any]]:
    """The columns at these places: lists of lists, lazy ones of lazy ones."""
    rows: dict[int, array[int]] = {}  # columns of one file have the same rows, and need them once

    def pick(values: Sequence[Any]) -> Sequence[Any]:
        if not isinstance(values, Lazy):
            return [values[i] for i in indices]
        known = id(values.rows)
        if known not in rows:
            rows[known] = array("q", (values.rows[i] for i in indices))
        return Lazy(values.read, rows[known])

    return {name: pick(values) for name, values in columns.items()}


def taken(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """The values at these places, in memory."""
    return values.take(indices) if isinstance(values, Lazy) else [values[i] for i in indices]


def mapped(values: Sequence[Any], function: Callable[[Any], T]) -> Sequence[T]:
    """The function of each value; of lazy ones when they are asked for."""
    if not isinstance(values, Lazy):
        return [function(value) for value in values]
    return Lazy(lambda rows: [function(value) for value in values.read(rows)], values.rows)


def joined(columns: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """One column after the other; a list if all are lists."""
    if not any(isinstance(values, Lazy) for values in columns):
        return [value for values in columns for value in values]
    starts = list(accumulate(map(len, columns), initial=0))

    def read(rows: Sequence[int]) -> list[Any]:
        found: list[Any] = []
        for part, some in groupby(rows, key=lambda row: bisect_right(starts, row) - 1):
            found += taken(columns[part], [row - starts[part] for row in some])
        return found

    return Lazy(read, range(starts[-1]))


class Records(Generic[T]):
    """Records that are read whole, whichever column of them is asked for; those read last are kept for the others.

    load: row numbers -> their records.
    """

    def __init__(self, load: Callable[[Sequence[int]], list[T]]) -> None:
        self._load = load
        self._rows, self._found = list[int](), list[T]()

    def field(self, get: Callable[[T], Any]) -> Read:
        """The function that reads one of their fields."""

        def read(rows: Sequence[int]) -> list[Any]:
            if rows != self._rows:
                self._rows, self._found = list(rows), self._load(rows)
            return [get(record) for record in self._found]

        return read


class ShortColumns:
    """Columns kept in memory while a file is gone through: of short values that come again, as labels are.

    A column goes at its first long value, or when it has had too many different ones.   same: each value once.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._same: dict[str, dict[Any, Any]] = {}
        self._rows = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the values of the next row.   A key that a row lacks is None there."""
        if not self._rows:
            self.columns, self._same = {name: [] for name in row}, {name: {} for name in row}
        self._rows += 1
        for name in list(self.columns):
            value, same = row.get(name), self._same[name]
            if isinstance(value, str):
                short = len(value) <= _LONG
            else:
                short = value is None or isinstance(value, bool | int | float)
            if short and len(same) < _DIFFERENT:
                self.columns[name].append(same.setdefault((type(value), value), value))
            else:
                del self.columns[name]
