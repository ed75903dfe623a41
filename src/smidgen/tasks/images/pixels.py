"""Images as a classifier is given them: decoded once and kept while there is room, else each time their batch comes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.images import Fit, decode_all

_ROOM = 2 << 30  # bytes of decoded images that are kept in memory


class Pixels:
    """room: bytes left for decoded images."""

    def __init__(self, room: int = _ROOM) -> None:
        self.room = room

    def inputs(self, images: Sequence[Any], names: Sequence[str], fit: Fit) -> list[dict[str, Any]]:
        """Per image what `batch` needs of it.   names: what to call it if it is broken.  Raises DataError."""
        size = len(images) * fit.channels * fit.height * fit.width
        if size > self.room:
            return [{"image": image, "name": name} for image, name in zip(images, names, strict=True)]
        self.room -= size
        return [{"pixels": pixels} for pixels in decode_all(images, fit, names)]

    @staticmethod
    def batch(rows: Sequence[Mapping[str, Any]], fit: Fit) -> Tensor:
        """(N, C, H, W) bytes."""
        if "pixels" in rows[0]:
            return torch.stack([row["pixels"] for row in rows])
        return decode_all([row["image"] for row in rows], fit, [row["name"] for row in rows])
