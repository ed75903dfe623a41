"""ProjectedAdapter: what all methods share whose low-rank change reads its input through fixed numbers.

    y' = y + s (x P^T) A^T B^T            W' = W + s B A P        P: (K, I), fixed     A: (R, K)     B: (O, R)

A and B, what is trained, never see x but x P^T (N, K): that alone is kept for backward, and no gradient of the size of
P is made.
"""

import torch.nn.functional as F
from torch import Tensor

from .kernels import frozen_linear_projected
from .layers import LinearKind
from .low_rank import LowRankAdapter


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
