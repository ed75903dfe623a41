"""PEANuT: a weight's change is a small network's output for that weight.  Zhong et al. 2024, arXiv:2410.01870.

    W' = W + s B Z^T                              Z_0 = f(W^T A^T)
    Z_i = f(Z_(i-1) E_i^T)                        i = 1 ... n, the encoders
    Z_(n+i) = f(Z_(n+i-1) D_i^T) + Z_(n-i)        the decoders; Z is the last of these

A: (R, O)   B: (O, R)   E_i, D_i: (R, R)   Z: (I, R), so the change is of rank R and never formed to run.
f: the non-linearity.   B starts at zero, so training starts from the base model.
Trainable parameters: 2 R O + 2 n R^2 per site.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.checks import require_finite, require_one_of, require_whole
from ..core.disk_names import DiskNames
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.site import Site


@method("peanut")
@dataclass(frozen=True, kw_only=True)
class PEANuT(Method):
    """A network on the weight.   rank: R.   depth: n.   non_linearity: f.   scale: s."""

    rank: int = 32
    depth: int = 0
    non_linearity: NonLinearity | Literal["none"] = "relu"
    scale: float = 1.0

    summary = "W' = W + s B f(W^T A^T)^T"
    paper = "Zhong et al. 2024, arXiv:2410.01870"
    reads_weight, on_stacks = True, False
    disk = DiskNames(
        "PEANUT",
        fields={"rank": "r", "non_linearity": "act_fn", "scale": "scaling"},
        tensors={"A": "peanut_A.weight", "B": "peanut_B.weight"},
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_whole(self, "depth", least=0)
        require_finite(self, "scale")
        require_one_of(self, "non_linearity", (*FUNCTIONS, "none"))

    def build(self, site: Site) -> "PEANuTAdapter":
        return PEANuTAdapter(self, site)


class PEANuTAdapter(LowRankAdapter):
    """A, B, and the encoders and decoders at one site."""

    in_blocks = False  # every row of the change depends on the whole weight

    def __init__(self, method: PEANuT, site: Site) -> None:
        super().__init__(site, scale=method.scale)
        R, depth = method.rank, method.depth
        self.function = FUNCTIONS.get(method.non_linearity)
        self.A = site.empty(R, site.fan_out)
        self.B = site.empty(site.fan_out, R)
        self.encoders = nn.ParameterList(site.empty(R, R) for _ in range(depth))
        self.decoders = nn.ParameterList(site.empty(R, R) for _ in range(depth))

    def reset(self, generator: torch.Generator | None) -> None:
        for weight in (self.A, *self.encoders, *self.decoders):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        W = self.site.weight()
        Z = self._applied((W.T @ self.A.T.to(W.dtype)).to(self.A.dtype))  # in W's dtype: a copy of W would be kept
        before = []
        for E in self.encoders:
            before.append(Z)
            Z = self._applied(Z @ E.T)
        for D in self.decoders:
            Z = self._applied(Z @ D.T) + before.pop()
        return Z.T, self.B

    def _applied(self, Z: Tensor) -> Tensor:
        return Z if self.function is None else self.function(Z)
