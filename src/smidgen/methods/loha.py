"""LoHa: add the Hadamard product of two low-rank matrices.  Nam-Hyeon et al. 2021 (FedPara), arXiv:2108.06098.

    W' = W + s (B1 A1) * (B2 A2)          s = alpha / R          * entry by entry: the rank is up to R^2

A1, A2: (R, I)   B1, B2: (O, R)   I = fan-in, O = fan-out, R = rank.
On a convolution I = C K for C input channels and a kernel of K entries; with `effective_conv` (proposition 3) a core
T: (R, R, K) carries the kernel, A becomes (R, C), and stands for the (R, C K) matrix sum_j T[i, j, k] A[j, c].
A2 starts at zero, so training starts from the base model.
Trainable parameters: 2 R (I + O) per site; with a core 2 R (C + O + R K).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_finite, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter, Gradients, Pullback
from ..core.layers import ConvKind, EmbeddingKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match


@dataclass(frozen=True, kw_only=True)
class Lycoris(Method):
    """What LoHa and LoKr have in common.

    rank: R; 4 to 32 is usual.   alpha: the change is scaled by alpha / R.
    effective_conv: on convolutions with a kernel, factor out a core that holds it.
    rank_dropout: probability that an output channel of the change is dropped in a training step.
    module_dropout: probability that the change of a whole site is.
    rank_pattern, alpha_pattern: other values for the sites that a glob matches: {"*.q_proj": 16}; the last one counts.
    """

    rank: int = 8
    alpha: float = 8.0
    effective_conv: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        require_whole(self, "rank")
        require_finite(self, "alpha")
        require_share(self, "rank_dropout", "module_dropout")

    def rank_at(self, site: Site) -> int:
        """R at this site."""
        return last_match(self.rank_pattern, site, self.rank)

    def scale_at(self, site: Site) -> float:
        """s at this site."""
        return last_match(self.alpha_pattern, site, self.alpha) / self.rank_at(site)

    def kernel_at(self, site: Site) -> tuple[int, ...]:
        """The kernel that a core holds; () where there is none: HF PEFT's rule, so that its folders fit."""
        kernel = tuple(site.stored.shape[2:]) if self.effective_conv and isinstance(site.kind, ConvKind) else ()
        return kernel if math.prod(kernel) > 1 else ()


class LycorisAdapter(AdditiveAdapter):
    """A change that is dropped in part while training: with HF PEFT's masks, on output channels and on the whole.

    Stands in front of a class that says how the change is run.
    """

    rescales = True  # what rank dropout keeps is scaled up by the share that it kept

    def __init__(self, method: Lycoris, site: Site) -> None:
        super().__init__(site)
        self.scale = method.scale_at(site)
        self.rank_dropout, self.module_dropout = method.rank_dropout, method.module_dropout

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._drops():  # the mask is on `delta`, which fused forwards never call
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        change = self.whole_delta(x)
        return change * self.site.channels(self._kept(change), change) if self._drops() else change

    def whole_delta(self, x: Tensor) -> Tensor:
        """`delta` without dropout."""
        return super().delta(x)

    def _drops(self) -> bool:
        return self.training and bool(self.rank_dropout or self.module_dropout)

    def _kept(self, like: Tensor) -> Tensor:
        """(O,): what each output channel of the change is multiplied by in this step."""
        O = self.site.fan_out
        keep = (torch.rand(O, device=like.device) >= self.rank_dropout).float()
        if self.rescales:
            keep = keep / keep.mean().clamp(min=1 / O)  # where nothing is kept the change is zero, not NaN
        return keep * (torch.rand((), device=like.device) >= self.module_dropout)


def with_core(A: Tensor, T: Tensor | None) -> Tensor:
    """A (R, C) spread over the kernel by its core T (R, R, *kernel): (R, C K).  A itself where there is no core."""
    return A if T is None else torch.einsum("ijk,jc->ick", T.flatten(2), A).flatten(1)


def stacked_product(B: Tensor, A: Tensor, stack: int) -> Tensor:
    """B (E O, R) times A (E R, I), each matrix of a stack by itself: (E O, I)."""
    if stack == 1:
        return B @ A
    return torch.bmm(B.view(stack, -1, B.shape[1]), A.view(stack, -1, A.shape[1])).flatten(0, 1)


@method("loha")
@dataclass(frozen=True, kw_only=True)
class LoHa(Lycoris):
    """The entrywise product of two low-rank changes: of higher rank for the same number of parameters."""

    summary = "W' = W + s (B1 A1) * (B2 A2), entry by entry"
    paper = "Nam-Hyeon et al. 2021, arXiv:2108.06098"
    disk = DiskNames(
        "LOHA",
        fields={"rank": "r", "effective_conv": "use_effective_conv2d"},
        tensors={
            "B1": "hada_w1_a",
            "A1": "hada_w1_b",
            "B2": "hada_w2_a",
            "A2": "hada_w2_b",
            "T1": "hada_t1",
            "T2": "hada_t2",
        },
        kinds=("linear", "conv"),
    )

    def build(self, site: Site) -> "LoHaAdapter":
        is_thin = 3 * self.rank_at(site) ** 2 <= min(site.fan_out, site.fan_in)  # below it costs less; by measurement
        return (ThinLoHa if is_thin and not isinstance(site.kind, EmbeddingKind) else WholeLoHa)(self, site)


class LoHaAdapter(LycorisAdapter):
    """A1, B1, A2, B2 at one site, and cores T1, T2.  Stacked experts have their own: A (E R, I), B (E O, R)."""

    def __init__(self, method: LoHa, site: Site) -> None:
        super().__init__(method, site)
        rank, stack, kernel = method.rank_at(site), site.linear.stack, method.kernel_at(site)
        fan_in = site.fan_in // math.prod(kernel)
        self.A1, self.A2 = site.empty(stack * rank, fan_in), site.empty(stack * rank, fan_in)
        self.B1, self.B2 = site.empty(stack * site.fan_out, rank), site.empty(stack * site.fan_out, rank)
        self.T1 = site.empty(rank, rank, *kernel) if kernel else None
        self.T2 = site.empty(rank, rank, *kernel) if kernel else None

    def reset(self, generator: torch.Generator | None) -> None:
        for parameter in (self.B1, self.A1, self.B2, self.T1, self.T2):
            if parameter is not None:  # He's, as the paper has it
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.A2)

    def weight_delta(self, rows: slice) -> Tensor:
        A1, A2, B1, B2 = with_core(self.A1, self.T1), with_core(self.A2, self.T2), self.scale * self.B1, self.B2
        stack = self.site.linear.stack
        if stack == 1:
            return (B1[rows] @ A1) * (B2[rows] @ A2)
        return (stacked_product(B1, A1, stack) * stacked_product(B2, A2, stack))[rows]


class WholeLoHa(LoHaAdapter, FullWeightAdapter):
    """Makes the change where R^2 is not small beside the weight; on an embedding its columns that are asked for."""

    blockwise = True

    def whole_delta(self, x: Tensor) -> Tensor:
        if not isinstance(self.site.kind, EmbeddingKind):
            return super().whole_delta(x)
        site = self.site
        return F.linear(site.project(x, self.A1), self.scale * self.B1) * site.expand(site.project(x, self.A2), self.B2)

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        A1, A2, B1, B2 = self.A1, self.A2, self.scale * self.B1[rows], self.B2[rows]
        one, two = B1 @ A1, B2 @ A2  # linear layers have no core and are no stack

        def back(dD: Tensor, gradients: Gradients) -> None:
            d_one, d_two = two.mul_(dD), one.mul_(dD)
            gradients[A1].addmm_(B1.T, d_one)
            gradients[A2].addmm_(B2.T, d_two)
            gradients[self.B1][rows].addmm_(d_one, A1.T, alpha=self.scale)
            gradients[self.B2][rows].addmm_(d_two, A2.T)

        return one * two if W is None else torch.addcmul(W, one, two), back


class ThinLoHa(LoHaAdapter, LowRankAdapter):
    """Runs the change as what it is, a product of rank R^2: its factors are all products of columns of two factors."""

    def factors(self) -> tuple[Tensor, Tensor]:
        stack = self.site.linear.stack
        A1, A2 = with_core(self.A1, self.T1), with_core(self.A2, self.T2)
        A1, A2 = A1.view(stack, -1, A1.shape[1]), A2.view(stack, -1, A2.shape[1])
        A = (A1[:, :, None] * A2[:, None]).flatten(0, 2)  # (E R^2, I)
        return A, (self.B1[:, :, None] * self.B2[:, None]).flatten(1)  # (E O, R^2)
