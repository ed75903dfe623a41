"""GraLoRA: a low-rank change for every block of a weight.  Jung et al. 2025, arXiv:2505.20355, section 3.

    W'_jn = W_jn + s B_jn A_jn          s = alpha / (R + H)          j, n = 1 ... k, blocks of outputs and of inputs

A_jn: (R / k, I / k)   B_jn: (O / k, R / k)   R = rank.   All k^2 together have as many parameters as LoRA of rank R.
Hybrid: + s B A of the whole weight, of rank H.   A: (H, I)   B: (O, H)
All B start at zero, so training starts from the base model.   Trainable parameters: (R + H) (I + O) per site.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site


@method("gralora")
@dataclass(frozen=True, kw_only=True)
class GraLoRA(Method):
    """LoRA in blocks.

    rank: R, a multiple of blocks.   alpha: of the scale.   blocks: k, a divisor of I and O.   hybrid_rank: H.
    dropout: on the input of what is added, while training.
    """

    rank: int = 32
    alpha: float = 64.0
    blocks: int = 2
    hybrid_rank: int = 0
    dropout: float = 0.0

    summary = "W' = W + s B A in each of k x k blocks"
    paper = "Jung et al. 2025, arXiv:2505.20355"
    faster = ("B", "general_B")
    on_stacks = False
    disk = DiskNames(
        "GRALORA",
        fields={"rank": "r", "blocks": "gralora_k", "hybrid_rank": "hybrid_r", "dropout": "gralora_dropout"},
        tensors={
            "A": "gralora_A",
            "B": "gralora_B",
            "general_A": "gralora_A_general.weight",
            "general_B": "gralora_B_general.weight",
        },
    )

    def check(self) -> None:
        require_whole(self, "rank", "blocks")
        require_whole(self, "hybrid_rank", least=0)
        require_share(self, "dropout")
        require(
            self.rank % self.blocks == 0,
            f"rank is {self.rank}; each of {self.blocks} blocks gets a share, so it is a multiple of {self.blocks}",
        )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if site.fan_in % self.blocks or site.fan_out % self.blocks:
            return (
                f"its {site.fan_out} x {site.fan_in} weight does not divide into {self.blocks} x {self.blocks} blocks"
            )
        return None

    def build(self, site: Site) -> "GraLoRAAdapter":
        return GraLoRAAdapter(self, site)


class GraLoRAAdapter(LowRankAdapter):
    """Factors at one site: A (k, I / k, R), of each block of inputs for all blocks of outputs; B (k, R, O / k)."""

    def __init__(self, method: GraLoRA, site: Site) -> None:
        R, H, k = method.rank, method.hybrid_rank, method.blocks
        super().__init__(site, scale=method.alpha / (R + H), dropout=method.dropout)
        self.A, self.B = site.empty(k, site.fan_in // k, R), site.empty(k, R, site.fan_out // k)
        self.general_A = site.empty(H, site.fan_in) if H else None
        self.general_B = site.empty(site.fan_out, H) if H else None
        self.thin = isinstance(site.kind, LinearKind)
        self.plain &= not self.thin  # nothing is fused: blocks that are zero are not multiplied

    def reset(self, generator: torch.Generator | None) -> None:
        # as LoRA's A of I / k inputs
        nn.init.kaiming_uniform_(self.A.data.mT, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)
        if self.general_A is not None and self.general_B is not None:
            nn.init.kaiming_uniform_(self.general_A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.general_B)

    def delta(self, x: Tensor) -> Tensor:
        if not self.thin:
            return super().delta(x)
        x = self.dropped(x)
        k, _, R = self.A.shape
        rows = x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)  # (n, N, I / k)
        h = torch.bmm(rows, self.A.to(x.dtype)).view(k, -1, k, R // k)  # (n, N, j, R / k)
        h = h.permute(2, 1, 0, 3).reshape(k, -1, R)  # each block of outputs: its share of all blocks of inputs
        y = torch.bmm(h, (self.scale * self.B).to(x.dtype)).transpose(0, 1).reshape(*x.shape[:-1], -1)
        if self.general_A is None or self.general_B is None:
            return y
        return y + F.linear(F.linear(x, self.general_A.to(x.dtype)), (self.scale * self.general_B).to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        k, _, R = self.A.shape
        A: Tensor = torch.block_diag(*self.A.mT)  # type: ignore[no-untyped-call]  # (n j R/k, I)
        shares = self.B.view(k, k, R // k, -1).permute(1, 2, 3, 0)  # (n, R/k, O/k, j)
        B = shares.diag_embed().permute(3, 2, 0, 4, 1).reshape(-1, len(A))  # (j O/k, n j R/k)
        if self.general_A is None or self.general_B is None:
            return A, B
        return torch.cat((A, self.general_A)), torch.cat((B, self.general_B), dim=1)
