"""HRA: turn the input of a layer by a chain of reflections.  Yuan et al. 2024, arXiv:2405.17484, equations 5 and 7.

    y' = W H x + b          W' = W H          H = H_1 H_2 ... H_R          H_k = I - 2 u_k u_k^T / |u_k|^2

U = (u_1, ..., u_R): (D, R)   R = rank   D = the fan-in; of an embedding, whose vectors are turned, the fan-out.
The chain is never walked.  It is H = I - U S U^T (compact WY: Schreiber and Van Loan 1989), with G = U^T U and
    S^-1 = G's upper triangle with half its diagonal                 or, with `orthogonalise`:  S^-1 = G / 2
The latter is what the chain becomes when Gram and Schmidt have made the u_k orthogonal to each other.
Vectors start in equal pairs, whose reflections cancel, so training starts from the base model up to rounding.  Of an
odd rank one is left over, and orthogonal vectors cannot be equal: then it starts elsewhere.
Trainable parameters: D R per site.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.method import Method, method
from ..core.rotation import RotationAdapter, turns_weight, width
from ..core.site import Site


@method("hra")
@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """A chain of Householder reflections.

    rank: R, how many; even, to start from the base model.   orthogonalise: make the vectors orthogonal to each other.
    """

    rank: int = 8
    orthogonalise: bool = False

    summary = "y' = W H x + b, H a chain of reflections"
    paper = "Yuan et al. 2024, arXiv:2405.17484"
    disk = DiskNames(
        "HRA",
        fields={"rank": "r", "orthogonalise": "apply_GS"},
        tensors={"U": "hra_u"},
        kinds=("linear", "conv"),
    )

    def check(self) -> None:
        require_whole(self, "rank")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.orthogonalise and self.rank > width(site):
            return f"{width(site)} channels have no {self.rank} directions orthogonal to each other"
        return None

    def by_weight(self, site: Site) -> bool:
        return turns_weight(site)

    def build(self, site: Site) -> "HRAAdapter":
        return HRAAdapter(self, site)


class HRAAdapter(RotationAdapter):
    """U at one site."""

    starts_as_base = False  # bit for bit

    def __init__(self, method: HRA, site: Site) -> None:
        super().__init__(site)
        self.orthogonalise = method.orthogonalise
        self.U = site.empty(width(site), method.rank)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.U, a=math.sqrt(5), generator=generator)
        if not self.orthogonalise and self.U.shape[1] % 2 == 0:
            with torch.no_grad():
                self.U[:, 1::2] = self.U[:, ::2]

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # small, and it should stay orthogonal
            U = self.U / torch.linalg.vector_norm(self.U, dim=0)
            G = U.T @ U  # (R, R)
            if self.orthogonalise:
                V = torch.linalg.solve(G / 2, U, left=False)  # U S  (D, R)
            else:
                half = torch.eye(len(G), dtype=G.dtype, device=G.device) / 2
                V = torch.linalg.solve_triangular(G.triu(1) + half, U, upper=True, left=False)
        # rows: x H^T = x - (x U) V^T, and back x H = x - (x V) U^T
        U, V = (V, U) if back else (U, V)
        turned: Tensor = x - (x @ U.to(x.dtype)) @ V.to(x.dtype).T
        return turned
