"""Bottleneck adapter: a small network after a layer, or beside it.  Houlsby et al. 2019, arXiv:1902.00751, section 2.

    a(x) = s (U f(D x + d) + u)

D "down": (W, I)   U "up": (O, W)   d: (W,)   u: (O,)   I, O = features read and given, equal in a transformer,
W = width = I / reduction_factor, f = non-linearity, s = scale.   U and u start at zero, so training starts from the
base model.   Trainable parameters: W (I + O) + W + O per place.

Where it stands, and with it which paper's adapter it is, says `placement`: core/side_network.py.  The authors of the
parallel one have s = 4.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_above_zero, require_finite, require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.method import method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.side_network import SideNetworks
from ..core.side_places import Network
from ..core.site import Site


@method("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(SideNetworks):
    """A small network after layers, or beside them.  Learns well with learning rates around 1e-4 to 1e-3.

    reduction_factor: the width is the number of features divided by this.   width: the width itself, instead.
    non_linearity: f; "silu" is what others call swish, "gelu_tanh" what they call gelu_new.
    scale: s.   dropout: probability of dropping a hidden feature of the adapter while training.   bias: have d and u.
    """

    reduction_factor: float = 16
    width: int | None = None
    non_linearity: NonLinearity = "relu"
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = True

    summary = "y' = y + s U f(D y)"
    paper = "Houlsby et al. 2019, arXiv:1902.00751"
    disk = DiskNames(
        "SMIDGEN_BOTTLENECK",
        tensors={
            "net.down": "adapter_down.weight",
            "net.down_bias": "adapter_down.bias",
            "net.up": "adapter_up.weight",
            "net.up_bias": "adapter_up.bias",
        },
    )

    def check(self) -> None:
        super().check()
        require_above_zero(self, "reduction_factor")
        require_whole(self, "width")
        require_finite(self, "scale")
        require_share(self, "dropout")
        require_one_of(self, "non_linearity", FUNCTIONS)

    def network(self, site: Site, fan_in: int, fan_out: int) -> "BottleneckNetwork":
        return BottleneckNetwork(self, site, fan_in, fan_out)


class BottleneckNetwork(Network):
    """D, d, U, u."""

    def __init__(self, method: Bottleneck, site: Site, fan_in: int, fan_out: int) -> None:
        super().__init__()
        width = method.width or max(1, round((fan_in or fan_out) / method.reduction_factor))
        self.f, self.scale, self.dropout = FUNCTIONS[method.non_linearity], method.scale, method.dropout
        if fan_in:
            self.down = site.empty(width, fan_in)
            self.down_bias = site.empty(width) if method.bias else None
        if fan_out:
            self.up = site.empty(fan_out, width)
            self.up_bias = site.empty(fan_out) if method.bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if name == "down":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)  # as nn.Linear starts
            else:
                nn.init.zeros_(parameter)

    def hidden(self, x: Tensor) -> Tensor:
        h = self.f(F.linear(x, self.down.to(x.dtype), None if self.down_bias is None else self.down_bias.to(x.dtype)))
        return F.dropout(h, self.dropout) if self.training and self.dropout else h

    def expanded(self, h: Tensor) -> Tensor:
        bias = None if self.up_bias is None else self.up_bias.to(h.dtype)
        return F.linear(h, self.up.to(h.dtype), bias) * self.scale
