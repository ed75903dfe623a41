"""LoKr: add a Kronecker product of two small matrices.  Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    W' = W + s W1 x W2          s = alpha / R          x: the Kronecker product          O = O1 O2     I = I1 I2

W1: (O1, I1)   W2: (O2, I2)   I = fan-in, O = fan-out; each is split as near to its root, or to `factor`, as it divides.
W2 = B2 A2 with A2: (R, I2), B2: (O2, R) where R is below half of W2's longer side, and so W1 with `decompose_both`.
On a convolution it is the C input channels that are split, C = I1 C2, and W2 carries the kernel: (O2, C2 K).  With
`effective_conv` a core T2: (R, R, K) does, and A2 is (R, C2): FedPara's proposition 3, arXiv:2108.06098.
W1 (of its factors B1) starts at zero, so training starts from the base model.
Trainable parameters: O1 I1 + R (O2 + I2) per site, or O1 I1 + O2 I2 where R is large.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import FullWeightAdapter
from ..core.layers import ConvKind, LinearKind
from ..core.method import method
from ..core.site import Site, compute_dtype
from .loha import Lycoris, LycorisAdapter, stacked_product, with_core


@method("lokr")
@dataclass(frozen=True, kw_only=True)
class LoKr(Lycoris):
    """A Kronecker product.

    decompose_both: make W1 a product too, where the rank is small enough.
    factor: the smaller part that O and I are split into is the largest that divides them and is not above; -1: the one
        next to the root.
    rescale_dropped: scale up what rank dropout keeps by the share that it kept.
    """

    decompose_both: bool = False
    factor: int = -1
    rescale_dropped: bool = False

    summary = "W' = W + s W1 x W2, a Kronecker product"
    paper = "Yeh et al. 2023, arXiv:2309.14859"
    disk = DiskNames(
        "LOKR",
        fields={
            "rank": "r",
            "effective_conv": "use_effective_conv2d",
            "factor": "decompose_factor",
            "rescale_dropped": "rank_dropout_scale",
        },
        tensors={
            "W1": "lokr_w1",
            "B1": "lokr_w1_a",
            "A1": "lokr_w1_b",
            "W2": "lokr_w2",
            "B2": "lokr_w2_a",
            "A2": "lokr_w2_b",
            "T2": "lokr_t2",
        },
        kinds=("linear", "conv"),
    )

    def check(self) -> None:
        super().check()
        require(
            isinstance(self.factor, int) and (self.factor > 0 or self.factor == -1),
            f"factor is {self.factor}; it is a whole number of at least 1, or -1 for the root",
        )

    def split_at(self, site: Site) -> tuple[tuple[int, int], tuple[int, int], int]:
        """(O1, O2), (I1, I2) or of a convolution (I1, C2), and how many entries its kernel has."""
        kernel = math.prod(site.stored.shape[2:]) if isinstance(site.kind, ConvKind) else 1
        return split(site.fan_out, self.factor), split(site.fan_in // kernel, self.factor), kernel

    def is_whole(self, site: Site) -> bool:
        """True if W2 is one matrix at this site, and no product."""
        (_, O2), (_, I2), _ = self.split_at(site)
        return max(O2, I2) <= 2 * self.rank_at(site)

    def build(self, site: Site) -> "LoKrAdapter":
        return LoKrAdapter(self, site)


def split(dimension: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, the smaller first: the rule of LyCORIS and HF PEFT.

    factor: itself first where it divides; otherwise the largest divisor not above it.   -1: that next to the root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    smaller = max(m for m in range(1, limit + 1) if dimension % m == 0)
    return smaller, dimension // smaller


class LoKrAdapter(LycorisAdapter, FullWeightAdapter):
    """W1 and W2 at one site, each whole or as two factors.  Stacked experts have their own, one below the other."""

    in_blocks = False

    def __init__(self, method: LoKr, site: Site) -> None:
        super().__init__(method, site)
        self.rescales = method.rescale_dropped
        self.thin = isinstance(site.kind, LinearKind)
        R, E, core = method.rank_at(site), site.linear.stack, method.kernel_at(site)
        (O1, O2), (I1, I2), kernel = method.split_at(site)
        self.I1, self.I2 = I1, I2
        whole1, whole2 = not method.decompose_both or max(O1, I1) <= 2 * R, method.is_whole(site)
        self.W1 = site.empty(E * O1, I1) if whole1 else None
        self.B1 = None if whole1 else site.empty(E * O1, R)
        self.A1 = None if whole1 else site.empty(E * R, I1)
        self.W2 = site.empty(E * O2, I2 * kernel) if whole2 else None
        self.B2 = None if whole2 else site.empty(E * O2, R)
        self.A2 = None if whole2 else site.empty(E * R, I2 if core else I2 * kernel)
        self.T2 = site.empty(R, R, *core) if core and not whole2 else None

    def reset(self, generator: torch.Generator | None) -> None:
        zero = self.B1 if self.W1 is None else self.W1
        for parameter in self.parameters():
            if parameter is zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.thin:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def whole_delta(self, x: Tensor) -> Tensor:
        if not self.thin:
            return super().whole_delta(x)
        dtype, device = compute_dtype(x), x.device.type
        with torch.autocast(device, enabled=False):
            W1, rows = (self._first() * self.scale).to(dtype), x.to(dtype).reshape(-1, self.I1, self.I2)
            if self.A2 is not None and self.B2 is not None and _is_thin(self.A2, self.B2):
                y = torch.matmul(W1, F.linear(F.linear(rows, self.A2.to(dtype)), self.B2.to(dtype)))
            else:
                y = kronecker(rows, W1, self._second().to(dtype))
        return y.view(*x.shape[:-1], -1)

    def weight_delta(self, rows: slice) -> Tensor:
        E = self.site.linear.stack
        W1, W2 = self._first() * self.scale, self._second()
        W1, W2 = W1.view(E, -1, W1.shape[1]), W2.view(E, -1, W2.shape[1])
        return torch.einsum("eac,ebd->eabcd", W1, W2).flatten(3, 4).flatten(0, 2)[rows]

    def _first(self) -> Tensor:
        """W1 (E O1, I1)."""
        if self.A1 is not None and self.B1 is not None:
            return stacked_product(self.B1, self.A1, self.site.linear.stack)
        assert self.W1 is not None
        return self.W1

    def _second(self) -> Tensor:
        """W2 (E O2, I2 K)."""
        if self.A2 is not None and self.B2 is not None:
            return stacked_product(self.B2, with_core(self.A2, self.T2), self.site.linear.stack)
        assert self.W2 is not None
        return self.W2


def _is_thin(A: Tensor, B: Tensor) -> bool:
    """True where B A (O2, I2) is so large that x goes through both rather than through their product."""
    (R, I2), O2 = A.shape, len(B)
    return 4 * R * (I2 + O2) < I2 * O2


def kronecker(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Rows x (N, I1, I2) by the Kronecker product of W1 (O1, I1) and W2 (O2, I2): (N, O1, O2)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
        return _product(x, W1, W2)
    result: Tensor = _Kronecker.apply(x, W1, W2)  # type: ignore[no-untyped-call]
    return result


class _Kronecker(torch.autograd.Function):
    """Y = W1 X W2^T of each row.   Kept: x alone, which what reads it keeps anyway.

    G   = dY W2                    (N, O1, I2)
    dX  = W1^T G                   (N, I1, I2)
    dW1 = sum_n G X^T              (O1, I1)
    dW2 = sum_n (W1^T dY)^T X      (O2, I2)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
        ctx.save_for_backward(x, W1, W2)
        return _product(x, W1, W2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W1, W2 = ctx.saved_tensors
        first = W1.T.expand(len(x), -1, -1)
        dx = dW1 = dW2 = None
        G = torch.matmul(dy, W2)
        if ctx.needs_input_grad[0]:
            dx = torch.bmm(first, G)
        if ctx.needs_input_grad[1]:
            dW1 = torch.bmm(G, x.mT).sum(0)
        if ctx.needs_input_grad[2]:
            dW2 = torch.bmm(first, dy).flatten(0, 1).T @ x.flatten(0, 1)
        return dx, dW1, dW2


def _product(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    return torch.bmm(W1.expand(len(x), -1, -1), F.linear(x, W2))
