"""Letterboxed images: scaled to fit a square, the rest grey; and boxes from the one to the other and back.

A box in an image is in shares of its width and height (`data.boxes.Box`), in the square it is x1, y1, x2, y2 in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Square:
    """How any image becomes a square of `side` pixels: letterboxed."""

    side: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def put(self, image: str, pixels: Tensor) -> None:
        """Decode an image into its place in a square (3, S, S).  Raises DataError."""
        place = Letterbox.of(image_size(image), self.side)
        inner = pixels.fill_(GREY)[:, place.top : place.top + place.height, place.left : place.left + place.width]
        inner.copy_(decode(image, Fit(height=place.height, width=place.width)))


def boxes_in_squares(table: Table, side: int, names: Sequence[str]) -> Tensor:
    """The boxes of all images in their squares, (N, G, 5) class and corners, padded with -1.

    names: of the classes; of equal ones the first counts.   Raises DataError for an image whose size is not known.
    """
    images, boxes = table.column(IMAGE), table.column(BOXES)
    index = {name: i for i, name in reversed(list(enumerate(names)))}
    targets = torch.full((len(table), max(map(len, boxes), default=0), 5), -1.0)
    for i, size in enumerate(in_threads(image_size, images)):
        place = Letterbox.of(size, side)
        for j, box in enumerate(boxes[i]):
            targets[i, j] = torch.tensor([index[box.name], *place.placed(box)])
    return targets
