"""LoRA: add a low-rank matrix to a weight.  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    W' = W + s B A          s = alpha / R, or alpha / sqrt(R) rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)

A: (R, I)   B: (O, R)   I = fan-in, O = fan-out, R = rank.   B starts at zero, so training starts from the base model
(on an embedding A does, as in the authors' code).   Trainable parameters: R (I + O) per site.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.kernels import frozen_linear_low_rank
from ..core.layers import EmbeddingKind
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Targets

Number = TypeVar("Number", int, float)


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
        return _last_match(self.rank_pattern, site, self.rank)

    def scale_at(self, site: Site) -> float:
        """s at this site."""
        rank = self.rank_at(site)
        return _last_match(self.alpha_pattern, site, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def build(self, site: Site) -> "LoRAAdapter":
        return LoRAAdapter(self, site)


class LoRAAdapter(AdditiveAdapter):
    """A and B at one site.  On stacked experts every expert has its own: A (E R, I), B (E O, R)."""

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__(site)
        rank, stack = method.rank_at(site), site.linear.stack
        self.scale = method.scale_at(site)
        self.dropout, self.dropout_on = method.dropout, method.dropout_on
        self.plain = site.storage.plain
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

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # a bare frozen Linear with nothing around it: one fused pass
        if self.plain and getattr(call, "__func__", None) is nn.Linear.forward and self._is_frozen():
            W, b, scale, mask = self.site.stored, self.site.bias, self.scale, None
            if self.training and self.dropout:
                shape = x.shape[-1:] if self.dropout_on == "features" else (x.numel() // x.shape[-1], x.shape[-1])
                scale, mask = scale / (1 - self.dropout), self._mask(shape, x.device)
            return frozen_linear_low_rank(x, W, b, cast(Tensor, self.A), self.B, scale, mask)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if self.training and self.dropout and x.is_floating_point():  # an embedding's input is indices
            if self.dropout_on == "features":
                mask = self._mask((self.site.linear.input_channels(self.site.layer),), x.device)
                x = x * self.site.channels(mask / (1 - self.dropout), x)
            else:
                x = F.dropout(x, self.dropout)
        return self.site.expand(self.site.project(x, self.A), self.B) * self.scale

    def weight_delta(self, rows: slice) -> Tensor:
        if self.site.linear.stack == 1:
            return (self.scale * self.B[rows]) @ self.A
        E, R = self.site.linear.stack, self.B.shape[1]
        per_expert = torch.bmm(self.B.view(E, -1, R), self.A.view(E, R, -1))  # (E, O, I)
        return self.scale * per_expert.flatten(0, 1)[rows]

    def _is_frozen(self) -> bool:
        b = self.site.bias
        return not self.site.stored.requires_grad and (b is None or not b.requires_grad)

    def _mask(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """1 where dropout keeps, 0 where it drops; uint8."""
        # 16 random bits for each: on a CPU bernoulli_ would take as long as the layer itself
        size, kept_of_bits = math.prod(shape), min(round((1 - self.dropout) * 2**16), 2**16 - 1)
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-size // 4),), device=device).view(torch.int16)[:size]
        return (bits < kept_of_bits - 2**15).view(torch.uint8).view(shape)


def _last_match(pattern: Mapping[str, Number], site: Site, default: Number) -> Number:
    matching = [value for glob, value in pattern.items() if Targets(glob).matches(site.name, site.layer)]
    return matching[-1] if matching else default
