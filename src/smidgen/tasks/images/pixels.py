"""Images as a model is given them: decoded once and kept while there is room, else each time their batch comes.

Those that are not kept stay where they are: in their files, or in rows of a file, of which a batch reads its own.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.free_memory import free_memory
from ...data.images import Fitting, content_key, decode_all, in_threads
from ...data.lazy import picked, taken
from ...data.made_rows import MadeRows

_MOST = 2 << 30  # bytes of decoded images that are kept in memory
_SHARE = 1 / 4  # of the free memory, that they may take


class Pixels:
    """room: bytes left for decoded images; None until the first images come: it then follows from the free memory."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room

    def rows(self, images: Sequence[Any], names: Sequence[str], fitting: Fitting) -> "ImageRows":
        """Images ready to be put into batches.   names: what to call them if they are broken.  Raises DataError."""
        if self.room is None:
            free = free_memory(torch.device("cpu"))
            self.room = _MOST if free is None else min(_MOST, int(_SHARE * free))
        channels, height, width = fitting.shape
        size_bytes = len(images) * channels * height * width
        if size_bytes > self.room:
            return ImageRows(images, names, fitting)
        self.room -= size_bytes
        return ImageRows(images, names, fitting, decode_all(images, fitting, names))


class ImageRows(MadeRows):
    """Images of one shape.

    images, names: of a table.   pixels: (N, C, H, W) bytes, all of them decoded, or None.
    rows: which of them, in which order; None for all.
    """

    def __init__(
        self,
        images: Sequence[Any],
        names: Sequence[str],
        fitting: Fitting,
        pixels: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.images, self.names, self.fitting, self.pixels = images, names, fitting, pixels
        self._rows = range(len(images)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Mapping[str, Tensor]:
        return {"pixels": self.batch([i])[0]}

    def select(self, indices: Sequence[int]) -> "ImageRows":
        rows = array("q", (self._rows[i] for i in indices))
        return ImageRows(self.images, self.names, self.fitting, self.pixels, rows)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """(N, C, H, W) bytes.  Raises DataError naming the broken."""
        rows = [self._rows[i] for i in indices]
        if self.pixels is not None:
            return self.pixels[rows]
        return decode_all(taken(self.images, rows), self.fitting, picked({"": self.names}, rows)[""])

    def sha256(self) -> str:
        """Of what the images are and how they are fitted; the same whether they are kept or not."""
        digest = hashlib.sha256(repr(self.fitting).encode())
        for key in in_threads(content_key, picked({"": self.images}, self._rows)[""]):
            digest.update(f"{key}\n".encode())
        return digest.hexdigest()
