"""SSF: scale and shift what a layer gives.  Lian et al. 2022, arXiv:2210.08823, equation 4.

    y' = g * y + s                  W' = diag(g) W    b' = g * b + s

g, s: (O,), one number for each of the O output channels.   g starts at 1 and s at 0, so training starts from the base
model.   Trainable parameters: 2 O per site; merged, none are left.   A layer without a bias of its own learns s as any
other, and has nothing that s could merge into: there it stays attached.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.disk_names import DiskNames
from ..core.errors import NotMergeable
from ..core.method import Method, method
from ..core.site import Site


@method("ssf")
@dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """Scale and shift each output channel."""

    summary = "y' = g * y + s"
    paper = "Lian et al. 2022, arXiv:2210.08823"
    disk = DiskNames("SMIDGEN_SSF")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "ssf changes what a call gives, not a parameter"
        return None if site.kind else f"{type(site.layer).__name__} gives no channels that are known here"

    def build(self, site: Site) -> "SSFAdapter":
        return SSFAdapter(site) if site.bias is None else SSFWithin(site)


class SSFAdapter(Adapter):
    """g and s at one site, which may have no bias that s could become part of."""

    mergeable = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.g = site.empty(site.fan_out)
        self.s = site.empty(site.fan_out)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.g)
        nn.init.zeros_(self.s)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        # y + (g - 1) y: g itself in bf16 would be off by up to 0.004, often all that was learned
        return torch.addcmul(y + self.site.channels(self.s, y), y, self.site.channels(self.g - 1, y))

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(f"{self.site.name} has no bias that s could become part of. Keep the adapter attached.")


class SSFWithin(SSFAdapter):
    """g and s at a layer that has a bias."""

    mergeable = True

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        g, s = self.g[rows].to(W.dtype), self.s[rows].to(W.dtype)
        return W * g[:, None], None if b is None else b * g + s
