"""LoRA: add a low-rank matrix to a weight.  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    W' = W + s B A          s = alpha / R, or alpha / sqrt(R) rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)

A: (R, I)   B: (O, R)   I = fan-in, O = fan-out, R = rank.   B starts at zero, so training starts from the base model
(on an embedding A does, as in the authors' code).   Trainable parameters: R (I + O) per site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import EmbeddingKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match


@method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank change of a weight.

    rank: R; 4 to 64 is usual.   alpha: the change is scaled by alpha / R.
    rank_stabilised: scale by alpha / sqrt(R) instead, so that large ranks keep learning.
    dropout: probability of dropping an entry of the adapter's input while training.
    dropout_on: "elements" draws a mask per entry of the input, as the paper does; "features" one per input feature
        and call, which costs next to nothing.
    rank_pattern, alpha_pattern: other values for the sites that a glob matches: {"*.q_proj": 16}; the last one counts.
    """

    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    dropout: float = 0.0
    dropout_on: Literal["elements", "features"] = "elements"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    summary = "W' = W + s B A"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    disk = DiskNames(
        "LORA",
        fields={"rank": "r", "alpha": "lora_alpha", "rank_stabilised": "use_rslora", "dropout": "lora_dropout"},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    )

    def check(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            require(isinstance(rank, int) and rank > 0, f"rank is {rank}; LoRA needs a whole number of at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            require(math.isfinite(alpha), f"alpha is {alpha}; it must be a finite number")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1")
        require(
            self.dropout_on in ("elements", "features"),
            f'dropout_on is "{self.dropout_on}"; it is "elements" or "features"',
        )

    def rank_at(self, site: Site) -> int:
        """R at this site."""
        return last_match(self.rank_pattern, site, self.rank)

    def scale_at(self, site: Site) -> float:
        """s at this site."""
        rank = self.rank_at(site)
        return last_match(self.alpha_pattern, site, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def build(self, site: Site) -> "LoRAAdapter":
        return LoRAAdapter(self, site)


class LoRAAdapter(LowRankAdapter):
    """A and B at one site.  On stacked experts every expert has its own: A (E R, I), B (E O, R)."""

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__(site, scale=method.scale_at(site), dropout=method.dropout, dropout_on=method.dropout_on)
        rank, stack = method.rank_at(site), site.linear.stack
        self.A = site.empty(stack * rank, site.fan_in)
        self.B = site.empty(stack * site.fan_out, rank)

    def reset(self, generator: torch.Generator | None) -> None:
        if isinstance(self.site.kind, EmbeddingKind):
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B, generator=generator)
        else:
            # the authors' choice, so results compare
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B
