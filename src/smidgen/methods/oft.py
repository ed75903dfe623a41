"""OFT: turn the input of a layer, block by block.  Qiu et al. 2023, arXiv:2306.07280, section 3.

    y' = W R^T x + b          W' = W R^T          R = diag(R_1, ..., R_n)          R_k = (I + Q_k)(I - Q_k)^-1

R_k: (B, B), orthogonal   Q_k = -Q_k^T, of its B (B - 1) / 2 numbers above the diagonal   n B = D, the fan-in; of an
embedding, whose vectors are turned, the fan-out.   COFT keeps norm(Q_k) within eps / sqrt(n).
OFTv2 (Qiu et al. 2025, arXiv:2506.19847) turns the input instead of the weight, and replaces the inverse by `terms` of
its Neumann series: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 for 5.
Q starts at zero, so training starts from the base model.   Trainable parameters: n B (B - 1) / 2 per site.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_above_zero
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import Method, method
from ..core.rotation import RotationAdapter, cayley, skew, turned_blockwise, turns_weight, upper_places, width
from ..core.site import Site


@method("oft")
@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Orthogonal blocks.

    block_size: B; at every site the divisor of D next to it.   blocks: n instead, where it is not 0.
    block_share: one Q for all blocks.   coft: keep near the base model, within eps.
    cayley_neumann: the series in place of the inverse.   terms: of the series, that of Q^0 included.
    """

    block_size: int = 32
    blocks: int = 0
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    cayley_neumann: bool = True
    terms: int = 5

    summary = "y' = W R^T x + b, R orthogonal in blocks"
    paper = "Qiu et al. 2023, arXiv:2306.07280"
    disk = DiskNames(
        "OFT",
        fields={
            "block_size": "oft_block_size",
            "blocks": "r",
            "cayley_neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
        },
        tensors={"Q": "oft_R.weight"},
        kinds=("linear", "conv", "embedding"),
        ignored=("module_dropout",),  # which HF PEFT never applies
    )

    def check(self) -> None:
        require(
            self.blocks > 0 or (self.blocks == 0 and self.block_size > 1),
            f"block_size is {self.block_size} and blocks {self.blocks}; "
            "say a block_size of at least 2, or how many blocks",
        )
        require(
            not self.cayley_neumann or self.terms >= 4,
            f"terms is {self.terms}; with fewer than 4 the series is no rotation to speak of",
        )
        require_above_zero(self, "eps")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.block_size_at(site) == 1:
            return f"{width(site)} channels divide into no blocks near {self.blocks or self.block_size}"
        return None

    def by_weight(self, site: Site) -> bool:
        return turns_weight(site)

    def block_size_at(self, site: Site) -> int:
        """B at this site: the divisor of D next to what was asked for, the smaller of two."""
        D = width(site)
        divisors = [n for n in range(1, D + 1) if D % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - min(self.blocks or self.block_size, D)))
        return D // nearest if self.blocks else nearest

    def build(self, site: Site) -> "OFTAdapter":
        return OFTAdapter(self, site)


class OFTAdapter(RotationAdapter):
    """Q at one site, the numbers above its blocks' diagonals."""

    places: Tensor

    def __init__(self, method: OFT, site: Site) -> None:
        super().__init__(site)
        self.size = B = method.block_size_at(site)
        self.terms = method.terms if method.cayley_neumann else 0
        blocks = 1 if method.block_share else width(site) // B
        self.largest = method.eps / blocks**0.5 if method.coft else None
        self.Q = site.empty(blocks, B * (B - 1) // 2)
        self.register_buffer("places", torch.empty(B * (B - 1) // 2, dtype=torch.long), persistent=False)

    def prepare(self) -> None:
        self.places = upper_places(self.size).to(self.Q.device)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.Q)

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        Q = skew(self.Q, self.places, self.size)
        if self.largest is not None:
            Q = Q * (self.largest / torch.linalg.matrix_norm(Q, keepdim=True).clamp_min(self.largest))
        # HF PEFT's sign: the series is of Q, the exact transform of -Q
        D = cayley(Q, self.terms) if self.terms else cayley(-Q)
        return turned_blockwise(x, D.mT if back else D)
