"""LargeRankAdapter: a low-rank change whose rank is near the layer's own size, run the cheaper of two ways.

    thin     x A^T B^T beside the layer       2.5 N R (I + O) multiplications more than the layer alone
    whole    one product with W + s B A       N O I + 3 R O I: W + s B A is formed twice, and its gradient taken apart

N: tokens; forward and backward, where A or B is fixed.
The more tokens, the better the whole way; in 16 bits, where W + s B A would round the change away, and
under dropout, it is always the thin one.  Either keeps nothing of the size of A, B or W for backward.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .adapter import Call
from .full_weight import FullWeightAdapter
from .kernels import frozen_linear_low_rank_by_making
from .low_rank import LowRankAdapter
from .site import Site


class LargeRankAdapter(LowRankAdapter, FullWeightAdapter):
    """As LowRankAdapter; rank: R, of one matrix."""

    products: ClassVar[float] = 2.5  # of the thin way, each N R (I + O)

    def __init__(self, site: Site, *, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(site, scale=scale, dropout=dropout)
        O, I = site.fan_out, site.fan_in
        saved = self.products * rank * (I + O) - O * I  # for each token
        # 4, not 3: forming it also goes through memory
        self.whole_from = 4 * rank * O * I / saved if saved > 0 else math.inf
        self._fuses |= type(self).fused is LargeRankAdapter.fused

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        return frozen_linear_low_rank_by_making(x, W, b, self.factors, self.trained_tensors(), scale, mask)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if wide and x.numel() > self.whole_from * x.shape[-1] and not (self.training and self.dropout):
            return FullWeightAdapter.forward(self, call, x, *args, **kwargs)
        return LowRankAdapter.forward(self, call, x, *args, **kwargs)


def scaled(M: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """M * u * v, broadcast, of a fixed M; keeps nothing of the product's size for backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
        return M * u * v
    result: Tensor = _Scaled.apply(M, u, v)  # type: ignore[no-untyped-call]
    return result


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, M: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(M, u, v)
        return M * u * v

    @staticmethod
    def backward(ctx: Any, dP: Tensor) -> Any:
        M, u, v = ctx.saved_tensors
        shared = dP * M
        return None, (shared * v).sum_to_size(u.shape), (shared * u).sum_to_size(v.shape)
