"""The hand-written backward of a frozen linear layer with a low-rank change.

    y = x W^T + b + s (x A^T) B^T          x: (..., I)   W: (O, I)   A: (R, I)   B: (O, R)

W and b get no gradient.  Kept for backward: x (shared by all layers that read it) and x A^T (small).
    g  = s dy B                 (N, R)
    dA = g^T x                  (R, I)
    dB = s dy^T (x A^T)         (O, R)
    dx = dy W + g A             (N, I), accumulated in place
Hu et al. 2021, arXiv:2106.09685, equation 3.  B A is never formed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .site import compute_dtype


class _FrozenLinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, scale, mask)
        ctx.save_for_backward(x, W, A, B, h, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, h, mask = ctx.saved_tensors
        A_cast, B_cast = A.to(x.dtype), B.to(x.dtype)
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        kept = rows if mask is None else rows * mask
        if torch.is_grad_enabled():  # this backward is itself differentiated, and h was computed outside any graph
            h = torch.mm(kept, A_cast.T)
        g = torch.mm(dy_rows, B_cast).mul_(ctx.scale)  # (N, R)
        dA = torch.mm(g.T, kept).to(A.dtype)
        dB = torch.mm(dy_rows.T, h).mul_(ctx.scale).to(B.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_rows, W)
            dx = dx.addmm_(g, A_cast) if mask is None else dx.add_(torch.mm(g, A_cast).mul_(mask))
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


def frozen_linear_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """x W^T + b + scale (x * mask) A^T B^T, with gradients for x, A and B only.

    x: (..., I).   mask: dropout's mask already divided by the keep probability, (N, I) or (1, I), or None.
    Under autocast everything runs in its dtype, as the frozen layer alone would.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = compute_dtype(x)
        x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
        with torch.autocast(device, enabled=False):
            return frozen_linear_low_rank(x, W, b, A, B, scale, mask)
    if torch.is_grad_enabled():
        result: Tensor = _FrozenLinearLowRank.apply(x, W, b, A, B, scale, mask)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, W, b, A, B, scale, mask)[0]


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and x A^T (N, R)."""
    y = F.linear(x, W, b)
    rows = x.reshape(-1, x.shape[-1])
    h = torch.mm(rows if mask is None else rows * mask, A.to(x.dtype).T)
    y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).T, alpha=scale)
    return y, h
