"""The hand-written backward of a frozen linear layer with a low-rank change.

    y = x W^T + b + s (x A^T) B^T          x: (..., I)   W: (O, I)   A: (R, I)   B: (O, R)

W and b get no gradient.  Kept for backward: x (shared by all layers that read it) and, if B is trained, x A^T.
    g  = s dy B                 (N, R)
    dA = g^T x                  (R, I)
    dB = s dy^T (x A^T)         (O, R)
    dx = dy W + g A             (N, I), accumulated in place
Hu et al. 2021, arXiv:2106.09685, equation 3.  B A is never formed.

Dropout's mask m stands at x in (m x) A^T; one that all rows share, (I,), may as well stand at the columns of A.
Where few entries are dropped, their places say it in fewer bytes and less time than a mask.
"""

from collections.abc import Callable
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
        ctx.save_for_backward(x, W, A, B, h if ctx.needs_input_grad[4] else None, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, h, mask = ctx.saved_tensors
        rows, A_cast = _factors(x, A, mask)
        dy_rows = dy.reshape(-1, dy.shape[-1])
        if h is not None and torch.is_grad_enabled():  # this backward is itself differentiated; h was outside any graph
            h = torch.mm(rows, A_cast.T)
        # B^T is laid out anew, it is small: this product is up to twice as fast so
        g = torch.mm(dy_rows, B.T.to(x.dtype).contiguous().T).mul_(ctx.scale)  # (N, R)
        dx = dA = dB = None
        if ctx.needs_input_grad[3]:  # some methods keep one of the two as it is
            dA = torch.mm(g.T, rows)
            dA = (dA.mul_(mask) if _is_of_features(mask) else dA).to(A.dtype)
        if ctx.needs_input_grad[4]:
            dB = torch.mm(h.T, dy_rows).mul_(ctx.scale).T.to(B.dtype)  # this way round is the faster one
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy_rows, W)
            if mask is None or _is_of_features(mask):
                dx.addmm_(g, A_cast)
            else:
                dx.add_(_dropped_(torch.mm(g, A_cast), mask))
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


def frozen_linear_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """x W^T + b + scale (x * mask) A^T B^T, with gradients for x, A and B only.

    x: (..., I).   mask: 1 where dropout keeps, 0 where it drops, uint8: (N, I) for entries of x, or (I,) for features;
    or, int64, the places in x.flatten() that it drops, in any order, any of them more than once.
    What is kept is not scaled up: that is the caller's, in `scale`.
    Under autocast everything runs in its dtype, as the frozen layer alone would.
    """
    if torch.is_autocast_enabled(x.device.type):
        return _outside_autocast(frozen_linear_low_rank, x, W, b, A, B, scale, mask)
    if torch.is_grad_enabled():
        result: Tensor = _FrozenLinearLowRank.apply(x, W, b, A, B, scale, mask)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, W, b, A, B, scale, mask)[0]


class _FrozenLinearScaled(torch.autograd.Function):
    """As above with the change's fixed factors A and B scaled: z = ((x A^T) * d) B^T, y = x W^T + b + s u * z.

    Kept: x A^T and z, and not x.
        g  = s (dy * u) B           (N, R)
        dd = sum_n g * (x A^T)      (R,)
        du = s sum_n dy * z         (O,)
        dx = dy W + (g * d) A       (N, I)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        u: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        rows, A_cast = _factors(x, A, mask)
        h = torch.mm(rows, A_cast.T)
        z = torch.mm(h * d.to(x.dtype), B.to(x.dtype).T)
        y = F.linear(x, W, b)
        y.view(z.shape).addcmul_(z, u.to(x.dtype), value=scale)
        ctx.save_for_backward(W, A, B, d, u, h, z, mask)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        W, A, B, d, u, h, z, mask = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        g = torch.mm(dy_rows * (ctx.scale * u).to(h.dtype), B.to(h.dtype))  # (N, R)
        dd = (g * h).sum(0).to(d.dtype)
        du = (dy_rows * z).sum(0).to(u.dtype) * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            g, A = g.mul_(d.to(h.dtype)), A.to(h.dtype)
            dx = torch.mm(dy_rows, W)
            if mask is None:
                dx.addmm_(g, A)
            elif _is_of_features(mask):
                dx.addmm_(g, A * mask)
            else:
                dx.add_(_dropped_(torch.mm(g, A), mask))
            dx = dx.view(*dy.shape[:-1], -1)
        return dx, None, None, None, None, dd, du, None, None


def frozen_linear_scaled(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    u: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """x W^T + b + scale u * (((x * mask) A^T * d) B^T), with gradients for x, d (R,) and u (O,) only.

    A, B, mask and autocast as in `frozen_linear_low_rank`.
    """
    if torch.is_autocast_enabled(x.device.type):
        return _outside_autocast(frozen_linear_scaled, x, W, b, A, B, d, u, scale, mask)
    result: Tensor = _FrozenLinearScaled.apply(x, W, b, A, B, d, u, scale, mask)  # type: ignore[no-untyped-call]
    return result


def _outside_autocast(run: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *rest: Any) -> Tensor:
    """The same with autocast off, in the dtype that the frozen layer alone would compute in."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return run(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), *rest)


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and x A^T (N, R)."""
    y = F.linear(x, W, b)
    rows, A_cast = _factors(x, A, mask)
    h = torch.mm(rows, A_cast.T)
    y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).T, alpha=scale)
    return y, h


def _factors(x: Tensor, A: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x as rows (N, I) and A (R, I), both in x's dtype, with dropout on one of them."""
    rows, A = x.reshape(-1, x.shape[-1]), A.to(x.dtype)
    if mask is None:
        return rows, A
    if _is_of_features(mask):
        return rows, A * mask
    if mask.dtype == torch.int64:
        return rows.flatten().index_fill(0, mask, 0).view(rows.shape), A
    return rows * mask.to(x.dtype), A


def _dropped_(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows (N, I) with the entries set to zero that dropout drops, in place."""
    if mask.dtype == torch.int64:
        rows.view(-1).index_fill_(0, mask, 0)
        return rows
    return rows.mul_(mask.to(rows.dtype))


def _is_of_features(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 1 and mask.dtype != torch.int64
