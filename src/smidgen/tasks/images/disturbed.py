"""Images disturbed at random together with their boxes: mirrored, scaled, shifted and recoloured, each by itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 114  # of 255: what is beyond an image's edges, as YOLO was trained with
_SCALE, _SHIFT = 0.25, 0.1  # in shares of the image
_LIGHT, _COLOUR = 0.2, 0.3
_LEFT = 0.3  # share of a box that has to be in the picture still


def disturbed(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """images: (N, 3, S, S) from 0 to 1.   targets: (N, G, 5), class and box in pixels, -1 where there is none.

    Random numbers are drawn from torch's generator on the CPU: the same on every device.
    """
    count, side = len(images), images.shape[-1]
    mirrored = 1 - 2 * (torch.rand(count) < 0.5).float()
    size = 1 + _SCALE * (2 * torch.rand(count) - 1)
    scale = torch.stack([mirrored * size, size], 1).to(images.device)  # (N, 2)
    shift = (_SHIFT * 2 * (2 * torch.rand(count, 2) - 1)).to(images.device)  # the image reaches from -1 to 1
    light = (1 + _LIGHT * (2 * torch.rand(count, 1, 1, 1) - 1)).to(images.device)
    colour = (1 + _COLOUR * (2 * torch.rand(count, 1, 1, 1) - 1)).to(images.device)

    theta = torch.cat([torch.diag_embed(1 / scale), (-shift / scale)[..., None]], dim=2)  # from where a pixel comes
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - GREY / 255, grid, align_corners=False) + GREY / 255
    grey = moved.mean(1, keepdim=True)
    moved = ((grey + colour * (moved - grey)) * light).clamp(0, 1)

    corners = targets[..., 1:].reshape(count, -1, 2, 2) * (2 / side) - 1
    corners = corners * scale[:, None, None] + shift[:, None, None]
    corners = (corners + 1) * (side / 2)  # (N, G, 2, 2)
    low, high = corners.amin(2), corners.amax(2)
    whole = (high - low).prod(-1)
    low, high = low.clamp(0, side), high.clamp(0, side)
    there = (targets[..., 0] >= 0) & ((high - low).prod(-1) > _LEFT * whole)
    rows = torch.cat([targets[..., :1], low, high], dim=-1)
    return moved, torch.where(there[..., None], rows, -1.0)
