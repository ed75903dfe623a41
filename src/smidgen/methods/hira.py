"""HiRA: multiply a weight by a low-rank matrix, entry by entry.  Huang et al. 2025, ICLR, openreview TwJrTz9cRS.

    W' = W + W o (B A)

o: the product of entries, through which the change has a high rank.   A: (R, I)   B: (O, R)
B starts at zero, so training starts from the base model (on an embedding A does).
Trainable parameters: R (I + O) per site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter, Gradients, Pullback
from ..core.layers import EmbeddingKind
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match


@method("hira")
@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """Entry-wise low-rank scaling of a weight.

    rank: R.   dropout: probability of dropping an entry of the adapter's input while training; with it a second
    product beside the layer is needed.
    rank_pattern: other ranks for the sites that a glob matches; the last one counts.
    """

    rank: int = 32
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    summary = "W' = W + W o (B A)"
    paper = "Huang et al. 2025, ICLR, openreview TwJrTz9cRS"
    disk = DiskNames(
        "HIRA",
        fields={"rank": "r", "dropout": "hira_dropout"},
        tensors={"A": "hira_A", "B": "hira_B"},
        kinds=("linear", "conv1d-transposed", "conv", "embedding"),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_share(self, "dropout")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        return None if site.storage.readable else f"its weight is held as {site.storage.name}; HiRA multiplies it"

    def build(self, site: Site) -> "HiRAAdapter":
        return HiRAAdapter(self, site)


class HiRAAdapter(FullWeightAdapter):
    """A and B at one site; stacked experts have their own: A (E R, I), B (E O, R)."""

    blockwise = True

    def __init__(self, method: HiRA, site: Site) -> None:
        super().__init__(site)
        self.dropout, self.stack = method.dropout, site.linear.stack
        self.looks_up = isinstance(site.kind, EmbeddingKind)
        rank = last_match(method.rank_pattern, site, method.rank)
        self.A = site.empty(self.stack * rank, site.fan_in)
        self.B = site.empty(self.stack * site.fan_out, rank)

    def reset(self, generator: torch.Generator | None) -> None:
        if self.looks_up:  # as LoRA's authors have it
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.dropout:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if self.looks_up:  # the words of x alone, not the whole table
            return F.embedding(x, self.site.stored) * self.site.expand(self.site.project(x, self.A), self.B)
        return super().delta(F.dropout(x, self.dropout, self.training))

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        A, B = self.A, self.B[rows]
        own = self.site.weight(rows).to(A.dtype)

        def back(dD: Tensor, gradients: Gradients) -> None:
            dP = dD.mul_(own)
            gradients[A].addmm_(B.T, dP)
            gradients[self.B][rows].addmm_(dP, A.T)

        D = (B @ A).mul_(own)
        return D if W is None else D.add_(W), back

    def weight_delta(self, rows: slice) -> Tensor:
        W = self.site.weight(rows).to(self.A.dtype)
        if self.stack == 1:
            return (self.B[rows] @ self.A).mul(W)
        per_expert = torch.bmm(self.B.view(self.stack, -1, self.B.shape[1]), self.A.view(self.stack, -1, W.shape[1]))
        return per_expert.flatten(0, 1)[rows] * W
