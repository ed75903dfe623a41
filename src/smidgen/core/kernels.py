"""The hand-written backward of a frozen linear layer with a low-rank change.

    y = x W^T + b + s (x A^T) B^T          x: (..., I)   W: (O, I)   A: (R, I)   B: (O, R)

W and b get no gradient.  Kept for backward: x (shared by all layers that read it), x A^T (small) and the casts of A and B.
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
        A_cast, B_cast = A.to(x.dtype), B.to(x.dtype)
        y = F.linear(x, W, b)
        rows = x.reshape(-1, x.shape[-1])
        h = torch.mm(rows if mask is None else rows * mask, A_cast.T)  # (N, R)
        y.view(-1, y.shape[-1]).addmm_(h, B_cast.T, alpha=scale)
        ctx.save_for_backward(x, W, A_cast, B_cast, h, mask)
        ctx.scale, ctx.master = scale, A.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, h, mask = ctx.saved_tensors
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        g = torch.mm(dy_rows, B).mul_(ctx.scale)  # (N, R)
        dA = torch.mm(g.T, rows if mask is None else rows * mask).to(ctx.master)
        dB = torch.mm(dy_rows.T, h).mul_(ctx.scale).to(ctx.master)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_rows, W)
            dx = dx.addmm_(g, A) if mask is None else dx.add_(torch.mm(g, A).mul_(mask))
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


def frozen_linear_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """x W^T + b + scale (x * mask) A^T B^T, with gradients for x, A and B only.

    x: (..., I).   mask: dropout's mask already divided by the keep probability, (N, I) or (1, I), or None.
    Under autocast everything runs in its dtype, as the frozen layer alone would.
    """
    dtype = compute_dtype(x)
    if x.dtype != dtype or W.dtype != dtype:
        x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    if torch.is_grad_enabled():
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = _FrozenLinearLowRank.apply(x, W, b, A, B, scale, mask)  # type: ignore[no-untyped-call]
        return result
    y = F.linear(x, W, b)
    rows = x.reshape(-1, x.shape[-1])
    h = torch.mm(rows if mask is None else rows * mask, A.to(dtype).T)
    y.view(-1, y.shape[-1]).addmm_(h, B.to(dtype).T, alpha=scale)
    return y
