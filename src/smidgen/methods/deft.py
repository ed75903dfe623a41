"""DEFT: take a subspace out of a weight and put something learned in its place.  Kumar et al. 2025, arXiv:2509.22793.

    W' = W - Q P^T W + s Q R            Q = P0, P = relu(P0), or Q = P orthonormal by QR of P0

P0: (O, K)   R: (K, I)   K = rank; s = alpha / K, or 1 without alpha.   Q (s R - P^T W) is of rank K and never formed.
R starts as P^T W / s, so training starts from the base model.   `para` takes out and puts in nothing (PaRa, Chen et al.
2024, arXiv:2406.05641), and does not.   Trainable parameters: K (O + I) per site, K O with `para`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.checks import require_above_zero, require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site


@method("deft")
@dataclass(frozen=True, kw_only=True)
class DEFT(Method):
    """A subspace replaced.

    rank: K.   alpha: what is put in is scaled by alpha / K.   decomposition: how Q and P come of P0.
    para: put nothing in.   dropout: probability of dropping an entry of the adapter's input while training.
    """

    rank: int = 8
    alpha: float | None = None
    decomposition: Literal["relu", "qr"] = "relu"
    para: bool = False
    dropout: float = 0.0

    summary = "W' = W - Q P^T W + s Q R"
    paper = "Kumar et al. 2025, arXiv:2509.22793"
    reads_weight, on_stacks = True, False
    disk = DiskNames(
        "DEFT",
        fields={"rank": "r", "decomposition": "decomposition_method", "dropout": "deft_dropout"},
        tensors={"P0": "deft_P", "R": "deft_R"},
        ignored=("init_scale",),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_above_zero(self, "alpha")
        require_share(self, "dropout")
        require_one_of(self, "decomposition", ("relu", "qr"))

    def build(self, site: Site) -> "DEFTAdapter":
        return DEFTAdapter(self, site)


class DEFTAdapter(LowRankAdapter):
    """P0 and R at one site."""

    in_blocks = False  # every row of the change depends on the whole weight

    def __init__(self, method: DEFT, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        K = min(method.rank, site.fan_out)  # a subspace has no more dimensions than the space
        self.s = 1.0 if method.alpha is None else method.alpha / K
        self.is_orthonormal, self.para = method.decomposition == "qr", method.para
        self.starts_as_base = not method.para  # type: ignore[misc]
        self.P0 = site.empty(site.fan_out, K)
        if not method.para:
            self.R = site.empty(K, site.fan_in)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.P0, std=0.02, generator=generator)
        if not self.para:
            self.R.copy_(self._subspace()[1] / self.s)

    def _subspace(self) -> tuple[Tensor, Tensor]:
        """Q (O, K) and P^T W (K, I)."""
        W = self.site.weight()
        Q = torch.linalg.qr(self.P0)[0] if self.is_orthonormal else self.P0
        P = Q if self.is_orthonormal else Q.relu()
        return Q, (P.T.to(W.dtype) @ W).to(Q.dtype)  # in W's dtype: a copy of W would be kept for backward

    def factors(self) -> tuple[Tensor, Tensor]:
        Q, taken = self._subspace()
        return -taken if self.para else self.s * self.R - taken, Q
