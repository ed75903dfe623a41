"""DeLoRA: a low-rank change whose size is learned apart from its direction.  Bini et al. 2025, arXiv:2503.18225.

    W' = W + (l / R) sum_r b_r a_r^T diag(w) / (|a_r| |b_r|)          w_i = |W_i|, the norm of W's column i

a_r: rows of A (R, I)   b_r: columns of B (O, R)   l: one number, the bound of the change: b_r a_r^T / |a_r| |b_r| has
size 1.   Norms count as 1e-4 at least, and B starts at zero, so training starts from the base model.
Trainable parameters: R (I + O) + 1 per site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.checks import require_finite, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match

_LEAST = 1e-4  # norm of a row of A or column of B


@method("delora")
@dataclass(frozen=True, kw_only=True)
class DeLoRA(Method):
    """Low-rank change with a learned bound.

    rank: R.   bound: where l starts.   dropout: probability of dropping an entry of the adapter's input while training.
    rank_pattern, bound_pattern: other values for the sites that a glob matches; the last one counts.
    """

    rank: int = 8
    bound: float = 15.0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    bound_pattern: Mapping[str, float] = field(default_factory=dict)

    summary = "W' = W + (l / R) B diag(1 / |a_r| |b_r|) A diag(|W_i|)"
    paper = "Bini et al. 2025, arXiv:2503.18225"
    reads_weight = True
    disk = DiskNames(
        "DELORA",
        fields={
            "rank": "r",
            "bound": "delora_lambda",
            "dropout": "module_dropout",
            "bound_pattern": "lambda_pattern",
        },
        tensors={"A": "delora_A", "B": "delora_B", "bound": "delora_lambda", "column_norms": "delora_w_norm"},
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_finite(self, "bound")
        require_share(self, "dropout")

    def build(self, site: Site) -> "DeLoRAAdapter":
        return DeLoRAAdapter(self, site)


class DeLoRAAdapter(LowRankAdapter):
    """A, B and l at one site; stacked experts have their own: A (E R, I), B (E O, R), l (E,)."""

    column_norms: Tensor

    def __init__(self, method: DeLoRA, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        self.stack, self.rank = site.linear.stack, last_match(method.rank_pattern, site, method.rank)
        self.start = float(last_match(method.bound_pattern, site, method.bound))
        self.A = site.empty(self.stack * self.rank, site.fan_in)
        self.B = site.empty(self.stack * site.fan_out, self.rank)
        self.bound = site.empty(self.stack)
        self.register_buffer("column_norms", torch.empty_like(self.A[0]).repeat(self.stack))

    def prepare(self) -> None:
        W = self.site.weight().to(self.A.dtype)
        self.column_norms = W.view(self.stack, -1, W.shape[1]).norm(dim=1).flatten()

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)
        nn.init.constant_(self.bound, self.start)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.A.view(self.stack, self.rank, -1), self.B.view(self.stack, -1, self.rank)
        sizes = A.norm(dim=2).clamp(min=_LEAST) * B.norm(dim=1).clamp(min=_LEAST)  # (E, R)
        B = B * (self.bound[:, None] / self.rank / sizes)[:, None]
        A = A * self.column_norms.view(self.stack, 1, -1)
        return A.flatten(0, 1), B.flatten(0, 1)
