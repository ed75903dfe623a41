"""The lines of a text file that is not read whole: where each begins is kept, 8 bytes a line, and the text is not."""

import io
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO, overload

from smidgen.core.errors import DataError
from smidgen.data.raw_text import begin

_GAP = 1 << 16  # bytes between two spans that are read together


class Lines(Sequence[str]):
    """The lines of an open file with their ends, in UTF-8; it is closed when nobody needs them any more.

    What is not UTF-8 is kept, for `damage` to find.

    ends: "\\n" alone ends a line; or "", "\\r" and "\\r\\n" do so too.   name: of the file in messages.
    Raises DataError if the file is not text, and later if it has changed since.
    """

    def __init__(self, file: BinaryIO, name: str, ends: str) -> None:
        self._file, self._name = file, name
        weakref.finalize(self, file.close)
        self._stamp = self._stamped()
        at = begin(file.read(8192), name)
        file.seek(at)
        self.starts = array("q")
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline=ends)
        for line in text:
            self.starts.append(at)
            at += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        text.detach()
        self.starts.append(at)
        self._first, self._block = 0, list[str]()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            return self.texts(rows, [i + 1 for i in rows])
        i = range(len(self))[index]
        if not self._first <= i < self._first + len(self._block):
            rows = range(i, min(i + 1024, len(self)))
            self._first, self._block = i, self.texts(rows, range(i + 1, rows.stop + 1))
        return self._block[i - self._first]

    def texts(self, firsts: Sequence[int], afters: Sequence[int]) -> list[str]:
        """The text from each of these lines to before another; spans that lie close are read together."""
        if self._stamped() != self._stamp:
            raise DataError(f"{self._name} has changed since it was checked. Start again")
        spans = [(self.starts[first], self.starts[after]) for first, after in zip(firsts, afters, strict=True)]
        found: list[str] = []
        for low, high in _runs(spans):
            self._file.seek(spans[low][0])
            data = self._file.read(spans[high - 1][1] - spans[low][0])
            start = spans[low][0]
            found += [data[a - start : b - start].decode("utf-8", "surrogateescape") for a, b in spans[low:high]]
        return found

    def _stamped(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


def _runs(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Which spans lie in order and close together: from, to before."""
    low = 0
    for i in range(1, len(spans) + 1):
        if i == len(spans) or not 0 <= spans[i][0] - spans[i - 1][1] <= _GAP:
            yield low, i
            low = i
