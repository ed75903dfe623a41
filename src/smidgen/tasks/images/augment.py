"""Disturbing images at random while training: a whole batch at once, by torch's generator, without torchvision.

    crop     a part of 60 to 100 % of the area, in a shape between 3:4 and 4:3, made as large as the whole
    shift    the whole, moved by up to an eighth of its side; its edge is repeated.  For small images, whose subject
             fills them and would be cut
    flip     left and right exchanged in every second image
    colour   brightness, contrast and saturation by a factor of 0.8 to 1.2 each

One sampling grid does crop, shift and flip.  Szegedy et al. 2015, arXiv:1409.4842, section 6; milder, since a few
hundred images and steps do not pay for strong disturbance.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.images import image_size, in_threads
from ...data.lazy import taken
from ...data.split import subset

Place = Literal["crop", "shift"]

_SAMPLE = 200  # images measured for their size
_SMALL = 64  # pixels: images of no more are small
_LEAST_AREA = 0.6
_SHAPE = 4 / 3
_SHIFT = 1 / 8
_COLOUR = 0.2
_SIDED = re.compile(r"left|right|digit|letter|character|text", re.IGNORECASE)
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def disturbed(pixels: Tensor, place: Place, *, flip: bool) -> Tensor:
    """Images (N, C, H, W) in 0..1 as new ones of the same shape, in 0..1."""
    scale, centre = _places(len(pixels), place, pixels.device)
    if flip:
        scale[:, 0] *= torch.randint(0, 2, (len(pixels),), device=pixels.device) * 2.0 - 1
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)  # x of the source = scale * x + centre
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], centre
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _coloured(moved)


def _places(count: int, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per image the share of each side that is seen (N, 2) and its middle (N, 2), x first, in -1..1."""
    if place == "shift":
        return torch.ones(count, 2, device=device), _between(-2 * _SHIFT, 2 * _SHIFT, count, 2, device=device)
    area = _between(_LEAST_AREA, 1.0, count, device=device)
    shape = _between(-math.log(_SHAPE), math.log(_SHAPE), count, device=device).exp()
    sides = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()], 1).clamp(max=1.0)
    return sides, _between(-1.0, 1.0, count, 2, device=device) * (1 - sides)


def _coloured(pixels: Tensor) -> Tensor:
    brightness, contrast, saturation = _between(1 - _COLOUR, 1 + _COLOUR, 3, len(pixels), 1, 1, 1, device=pixels.device)
    pixels = pixels * brightness
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + contrast * (pixels - mean)
    if pixels.shape[1] == 3:
        weights = torch.tensor(_GREY, device=pixels.device, dtype=pixels.dtype).view(1, 3, 1, 1)
        grey = (pixels * weights).sum(1, keepdim=True)
        pixels = grey + saturation * (pixels - grey)
    return pixels.clamp(0, 1)


def _between(low: float, high: float, *shape: int, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(shape, device=device)


def usual_place(images: Sequence[Any], seed: int) -> tuple[Place, str]:
    """Whether to crop or shift images, by the size of some of them; and why."""
    some = taken(images, subset(len(images), None, _SAMPLE, seed))
    side = sorted(min(size) for size in in_threads(image_size, some))[len(some) // 2]
    if side <= _SMALL:
        return "shift", f"images of {side} pixels are small: a crop would cut their subject"
    return "crop", "cut and made large"


def flip_is_safe(kind: str, names: Sequence[str]) -> tuple[bool, str]:
    """Whether an image and its mirror image have the same label, as far as the names of the classes tell; and why."""
    if kind == "regression":
        return False, "a number may depend on the side, as a steering angle does (task.flip: true)"
    if all(len(name) == 1 or name.isnumeric() for name in names):
        return False, "the classes are digits or letters: mirrored they are others, or none (task.flip: true)"
    if sided := [name for name in names if _SIDED.search(name)]:
        return False, f'the class "{sided[0]}" sounds as if sides mattered (task.flip: true)'
    return True, "a mirror image has the same class; where that is wrong: task.flip: false"
