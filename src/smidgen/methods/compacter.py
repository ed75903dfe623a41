"""Compacter: a bottleneck adapter whose matrices are sums of Kronecker products.  Mahabadi et al. 2021,
arXiv:2106.04647, equations 5 to 7.

    a(x) = s (f(x H + d) H' + u)          H = sum_i A_i (x) (S_i T_i)

A_i: (n, n), i = 1 ... n, one set for all H of the model   S_i: (I / n, r)   T_i: (r, W / n) of the down-projection; of
the up-projection S'_i: (W / n, r), T'_i: (r, O / n)   d: (W,)   u: (O,)
I, O = features read and given, W = width, r = rank, n = how many, f = non-linearity, s = scale.
T' and u start at zero, so training starts from the base model.
Trainable parameters: n^3 once, and r (I + W) + r (W + O) + W + O per place.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.blocks import feedforward_half, output_width
from ..core.checks import require_above_zero, require_finite, require_one_of, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import Shared, method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.side_network import Placement, SideNetworks
from ..core.side_places import Network, Together
from ..core.site import Site


@method("compacter")
@dataclass(frozen=True, kw_only=True)
class Compacter(SideNetworks):
    """A bottleneck of very few parameters.  Compacter++ is placement="feedforward".

    reduction_factor: the width is the number of features divided by this, and a multiple of n.   width: the width
        itself, instead.
    kronecker: n; it divides the features and the width.   rank: r.   non_linearity: f.   scale: s.
    """

    placement: Placement = "both"
    reduction_factor: float = 32
    width: int | None = None
    kronecker: int = 4
    rank: int = 1
    non_linearity: NonLinearity = "gelu"
    scale: float = 1.0

    summary = "y' = y + s (f(y H) H'), H = sum_i kron(A_i, S_i T_i)"
    paper = "Mahabadi et al. 2021, arXiv:2106.04647"
    disk = DiskNames("SMIDGEN_COMPACTER")

    def check(self) -> None:
        super().check()
        require_whole(self, "kronecker", "rank", "width")
        require_above_zero(self, "reduction_factor")
        require_finite(self, "scale")
        require_one_of(self, "non_linearity", FUNCTIONS)
        require(
            self.width is None or self.width % self.kronecker == 0,
            f"width is {self.width}; it must be a multiple of kronecker, {self.kronecker}",
        )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        half = feedforward_half(site.path) if self.placement == "parallel" and site.kind else None
        reads = site.fan_in if self.placement == "parallel" and site.kind else 0
        gives = site.fan_out if site.kind else output_width(site.layer) or 0
        used = {"input": (reads,), "output": (gives,)}.get(half[0] if half else "", (reads, gives))
        if any(size % self.kronecker for size in used):
            return f"kronecker={self.kronecker} does not divide {' and '.join(map(str, filter(None, used)))} features"
        return None

    def network(self, site: Site, fan_in: int, fan_out: int) -> "KroneckerNetwork":
        return KroneckerNetwork(self, site, fan_in, fan_out)

    def shared(self, sites: tuple[Site, ...]) -> "SharedRule":
        super().shared(sites)  # which refuses places that cannot be
        return SharedRule(self, sites)


class SharedRule(Together):
    """A (n, n, n), of all networks."""

    def __init__(self, method: Compacter, sites: tuple[Site, ...]) -> None:
        super().__init__(sites, method.drop_first)
        self.A = sites[0].empty(*[method.kronecker] * 3)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.A, std=len(self.A) ** -0.5, generator=generator)  # H is then as large as the S_i T_i


class KroneckerNetwork(Network):
    """S, T, d of the one half, S', T', u of the other."""

    rule: SharedRule

    def __init__(self, method: Compacter, site: Site, fan_in: int, fan_out: int) -> None:
        super().__init__()
        n, r = method.kronecker, method.rank
        width = method.width or max(1, round((fan_in or fan_out) / method.reduction_factor / n)) * n
        self.f, self.scale = FUNCTIONS[method.non_linearity], method.scale
        if fan_in:
            self.down_left, self.down_right = site.empty(n, fan_in // n, r), site.empty(n, r, width // n)
            self.down_bias = site.empty(width)
        if fan_out:
            self.up_left, self.up_right = site.empty(n, width // n, r), site.empty(n, r, fan_out // n)
            self.up_bias = site.empty(fan_out)

    def connect(self, shared: Shared) -> None:
        self.__dict__["rule"] = shared  # held once, by the first adapter

    def reset(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("left"):  # so that H has the size that nn.Linear starts with
                fan_in = parameter.shape[0] * parameter.shape[1]
                nn.init.normal_(parameter, std=(3 * fan_in) ** -0.5, generator=generator)
            elif name == "down_right":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def matrix(self, left: Tensor, right: Tensor) -> Tensor:
        """H^T, (out, in).  It is no larger than a bottleneck's own matrix, and one product with it beats n small."""
        A = self.rule.A
        blocks = torch.einsum("iab,ipr,irq->bqap", A, left, right)
        return blocks.reshape(A.shape[2] * right.shape[2], A.shape[1] * left.shape[1])

    def hidden(self, x: Tensor) -> Tensor:
        D = self.matrix(self.down_left, self.down_right).to(x.dtype)
        return self.f(F.linear(x, D, self.down_bias.to(x.dtype)))

    def expanded(self, h: Tensor) -> Tensor:
        U = self.matrix(self.up_left, self.up_right).to(h.dtype)
        return F.linear(h, U, self.up_bias.to(h.dtype)) * self.scale
