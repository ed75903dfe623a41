"""Letterboxed images: scaled to fit a square, the rest grey; and boxes from the one to the other and back.

A box in an image is in shares of its width and height (`data.boxes.Box`), in the square it is x1, y1, x2, y2 in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...core.errors import DataError
from ...data.boxes import BOXES, IMAGE, Box
from ...data.images import Fit, decode, image_size, in_threads
from ...data.table import Table
from .disturbed import GREY


@dataclass(frozen=True)
class Letterbox:
    """Where an image of `size` (height, width) lies in its square: top, left, height and width in pixels."""

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of(cls, size: tuple[int, int], side: int) -> Self:
        """side: of the square."""
        scale = side / max(size)
        height, width = (max(1, round(length * scale)) for length in size)
        return cls(size, (side - height) // 2, (side - width) // 2, height, width)

    def put(self, image: str, square: Tensor) -> None:
        """Decode an image into its place in a square (3, S, S).  Raises DataError."""
        pixels = decode(image, Fit(height=self.height, width=self.width))
        square[:, self.top : self.top + self.height, self.left : self.left + self.width] = pixels

    def placed(self, box: Box) -> list[float]:
        """The corners of a box in the square."""
        x1, y1 = box.cx - box.width / 2, box.cy - box.height / 2
        left, top = self.left + x1 * self.width, self.top + y1 * self.height
        return [left, top, self.left + (x1 + box.width) * self.width, self.top + (y1 + box.height) * self.height]

    def back(self, corners: Tensor) -> Tensor:
        """Corners (4,) in the square as pixels of the image itself, none beyond its edges."""
        height, width = self.size
        shift = torch.tensor([self.left, self.top, self.left, self.top])
        scale = torch.tensor([width / self.width, height / self.height] * 2)
        return ((corners - shift) * scale).clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def letterboxed(table: Table, side: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All images in squares, (N, 3, S, S) bytes, and their boxes, (N, G, 5) class and corners, padded with -1.

    names: of the classes; of equal ones the first counts.   Raises DataError for an image that cannot be decoded.
    """
    images, boxes = table.column(IMAGE), table.column(BOXES)
    index = {name: i for i, name in reversed(list(enumerate(names)))}
    placed = [Letterbox.of(size, side) for size in in_threads(image_size, images)]
    pixels = torch.full((len(table), 3, side, side), GREY, dtype=torch.uint8)
    targets = torch.full((len(table), max(map(len, boxes), default=0), 5), -1.0)

    def put(i: int) -> None:
        try:
            placed[i].put(images[i], pixels[i])
        except DataError as error:
            raise DataError(f"{table.where(i)}: {error}") from None
        for j, box in enumerate(boxes[i]):
            targets[i, j] = torch.tensor([index[box.name], *placed[i].placed(box)])

    in_threads(put, range(len(table)))
    return pixels, targets
