"""ProjectedAdapter: what all methods share whose low-rank change reads its input through fixed numbers.

    y' = y + s (x P^T) A^T B^T            W' = W + s B A P        P: (K, I), fixed     A: (R, K)     B: (O, R)

A and B, what is trained, never see x but x P^T (N, K): that alone is kept for backward, and no gradient of the size of
P is made.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import dropped_, is_of_features, outside_autocast, with_dropout
from .layers import LinearKind
from .low_rank import LowRankAdapter
from .products import linear, thin, times


class ProjectedAdapter(LowRankAdapter):
    """A subclass has `parts`, and `factors`, which of one matrix are A P and B."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """P (K, I), A (R, K) and B (O, R), of one matrix; A and B differentiable; all in fp32 or better."""
        raise NotImplementedError

    @property
    def by_factors(self) -> bool:
        return self.runs_as(ProjectedAdapter)

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        return frozen_linear_projected(x, W, b, *self.parts(), scale, mask)

    def delta(self, x: Tensor) -> Tensor:
        if not isinstance(self.site.kind, LinearKind):
            return super().delta(x)
        P, A, B = self.parts()
        h = self.site.project(self.dropped(x), P)  # (..., K)
        return self.site.expand(F.linear(h, A.to(h.dtype)), B) * self.scale


class _FrozenLinearProjected(torch.autograd.Function):
    """A frozen linear layer with a change behind a fixed P: h = x P^T, y = x W^T + b + s (h A^T) B^T.

    Kept: h, and not x.
        z  = h A^T                  (N, R), made again
        g  = s dy B                 (N, R)
        dA = g^T h                  (R, K)
        dB = s dy^T z               (O, R)
        dx = dy W + g (A P)         (N, I)
    h is an output too, so that what is kept belongs to the graph and this backward can itself be differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        P: Tensor,
        A: Tensor | None,
        B: Tensor,
        scale: float,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y = linear(x, W, b)
        rows, P_cast = with_dropout(x, P, mask)
        h = thin(rows, P_cast)  # (N, K)
        z = h if A is None else thin(h, A.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(z, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(W, P, A, B, h, mask)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        W, P, A, B, h, mask = ctx.saved_tensors
        of_x, _, _, _, of_A, of_B, _, _ = ctx.needs_input_grad
        dx = dA = dB = None
        dy_rows = h.new_zeros(len(h), len(W)) if dy is None else dy.reshape(-1, dy.shape[-1])
        P = P.to(h.dtype)
        A_cast = None if A is None else A.to(h.dtype)
        g = thin(dy_rows, B.T.to(h.dtype)).mul_(ctx.scale)
        if of_A:
            dA = torch.mm(g.T, h).to(A.dtype)
        if of_B:
            z = h if A_cast is None else thin(h, A_cast)
            dB = torch.mm(z.T, dy_rows).mul_(ctx.scale).T.to(B.dtype)
        if of_x:
            dx = times(dy_rows, W)
            _add_projected(dx, g, P if A_cast is None else torch.mm(A_cast, P), mask)
            if dh is not None:  # in a second derivative
                _add_projected(dx, dh, P, mask)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, dA, dB, None, None


def _add_projected(dx: Tensor, g: Tensor, A: Tensor, mask: Tensor | None) -> None:
    """Add g A to dx (N, I), with dropout's mask."""
    if mask is None or is_of_features(mask):
        dx.addmm_(g, A if mask is None else A * mask)
    else:
        dx.add_(dropped_(torch.mm(g, A), mask))


def frozen_linear_projected(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    P: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """x W^T + b + scale ((x * mask) P^T) A^T B^T, with gradients for x, A and B only; x is not kept for them.

    P: (K, I), fixed   A: (R, K), or None where B (O, K) follows at once.   mask and autocast as in
    `frozen_linear_low_rank`.
    """
    if torch.is_autocast_enabled(x.device.type):
        return outside_autocast(frozen_linear_projected, x, W, b, P, A, B, scale, mask)
    y, _ = _FrozenLinearProjected.apply(x, W, b, P, A, B, scale, mask)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)
