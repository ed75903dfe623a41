"""BOFT: turn the input of a layer by a product of butterfly factors.  Liu et al. 2023, arXiv:2311.06243, section 4.

    y' = s * (W R^T x) + b     W' = diag(s) W R^T     R = R_M ... R_2 R_1     R_m = P_m diag(R_m1, ..., R_mn) P_m^T

R_mk: (B, B), orthogonal, by Cayley's transform (I - Q)(I + Q)^-1 of Q = (q - q^T) / 2   q: (M, n, B, B)   n B = D, the
fan-in; of an embedding, whose vectors are turned, the fan-out.   s: (O,) scales outputs.
P_m sorts half-blocks: of each 2^m neighbours the even ones first, so that M factors mix blocks 2^(M-1) apart.
q starts at zero and s at 1, so training starts from the base model.   Trainable parameters: M D B + O per site, though
of q only the skew-symmetric half counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Call
from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import Method, method
from ..core.rotation import RotationAdapter, cayley, turned_blockwise, turns_weight, width
from ..core.site import Site


@method("boft")
@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """Butterfly factors.

    block_size: B, which divides D.   blocks: n instead, where it is not 0.
    factors: M; more than one needs even blocks, and 2^(M-1) to divide their number.
    dropout: while training, one factor, drawn for each call, leaves out this share of its blocks.
    """

    block_size: int = 4
    blocks: int = 0
    factors: int = 1
    dropout: float = 0.0

    summary = "y' = s * (W R^T x) + b, R a product of butterflies"
    paper = "Liu et al. 2023, arXiv:2311.06243"
    disk = DiskNames(
        "BOFT",
        fields={
            "block_size": "boft_block_size",
            "blocks": "boft_block_num",
            "factors": "boft_n_butterfly_factor",
            "dropout": "boft_dropout",
        },
        tensors={"q": "boft_R", "s": "boft_s"},
        kinds=("linear", "conv"),
    )

    def check(self) -> None:
        require(
            self.blocks > 0 or (self.blocks == 0 and self.block_size > 1),
            f"block_size is {self.block_size} and blocks {self.blocks}; "
            "say a block_size of at least 2, or how many blocks",
        )
        require_whole(self, "factors")
        require_share(self, "dropout")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        D, apart = width(site), 2 ** (self.factors - 1)
        B = D // self.blocks if self.blocks else self.block_size
        if B < 2 or D % B or (self.blocks and D % self.blocks):
            asked = f"{self.blocks} blocks" if self.blocks else f"blocks of {B}"
            return f"{D} channels do not divide into {asked}"
        if self.factors > 1 and (B % 2 or D // B % apart):
            return f"{D // B} blocks of {B} are too few or odd for {self.factors} butterfly factors"
        return None

    def by_weight(self, site: Site) -> bool:
        return turns_weight(site)

    def build(self, site: Site) -> "BOFTAdapter":
        return BOFTAdapter(self, site)


class BOFTAdapter(RotationAdapter):
    """q and s at one site."""

    def __init__(self, method: BOFT, site: Site) -> None:
        super().__init__(site)
        self.dropout = method.dropout
        D = width(site)
        B = D // method.blocks if method.blocks else method.block_size
        self.q = site.empty(method.factors, D // B, B, B)
        self.s = site.empty(site.linear.stack * site.fan_out, 1)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.q)
        nn.init.ones_(self.s)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(call, x, *args, **kwargs)
        more, b = self.s.flatten() - 1, self.site.bias
        scaled = torch.addcmul(y, y, self.site.channels(more, y))
        return scaled if b is None else scaled - self.site.channels(more * b, y)  # b itself is not scaled

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        W, b = super().merged(W, b, rows)
        return W * self.s[rows].to(W.dtype), b

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        M, n, B, _ = self.q.shape
        D = cayley((self.q.mT - self.q).flatten(0, 1) / 2).view(self.q.shape)  # R_m - I
        if self.training and self.dropout:
            D = D * self._kept(M, n)
        for m in range(M) if back else reversed(range(M)):
            if m:
                halves = (*x.shape[:-1], n >> m, 2, 1 << m, B // 2)
                x = x.reshape(halves).transpose(-3, -2).reshape(x.shape)  # x P
            x = turned_blockwise(x, D[m].mT if back else D[m])
            if m:
                halves = (*x.shape[:-1], n >> m, 1 << m, 2, B // 2)
                x = x.reshape(halves).transpose(-3, -2).reshape(x.shape)  # x P^T
        return x

    def _kept(self, M: int, n: int) -> Tensor:
        """0 for the blocks that dropout leaves out, 1 for the others: (M, n, 1, 1)."""
        device = self.q.device
        factor = torch.arange(M, device=device) == torch.randint(M, (1,), device=device)
        block = torch.rand(n, device=device).argsort() < int(self.dropout * n)
        return (~(factor[:, None] & block))[..., None, None].to(self.q.dtype)
