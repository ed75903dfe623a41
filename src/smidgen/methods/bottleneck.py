"""Bottleneck adapter: a small network with a residual after a layer, or beside it.  Houlsby et al. 2019, arXiv:1902.00751, section 2.

    y' = y + s (U f(D y + d) + u)       after a module that gives y
    y' = y + s (U f(D x + d) + u)       beside a feed-forward that makes y from x (parallel)

D "down": (W, I)   U "up": (O, W)   d: (W,)   u: (O,)   I, O = features read and given, equal in a transformer,
W = width = I / reduction_factor, f = non-linearity, s = scale.   U and u start at zero, so training starts from the base
model.   Trainable parameters: W (I + O) + W + O per place.

Placements: both = Houlsby et al. (after the output layer of every attention and feed-forward); feedforward = Pfeiffer et
al. 2020, arXiv:2005.00247 (after the feed-forward only, half the parameters); parallel = He et al. 2021,
arXiv:2110.04366, who scale it by 4.  All act before the residual is added and normalised.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, AdditiveAdapter, Call
from ..core.blocks import attentions, feedforward_half, feedforwards, not_recognised, output_width
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.layers import LinearKind, NormKind
from ..core.method import Method, Shared, method
from ..core.site import Site

NonLinearity = Literal["relu", "gelu", "silu", "tanh"]
Placement = Literal["feedforward", "both", "parallel"]
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@method("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A small network after layers, or beside them.  Learns well with learning rates around 1e-4 to 1e-3.

    reduction_factor: the width is the number of features divided by this.   width: the width itself, instead.
    non_linearity: f; "silu" is what others call swish.
    placement: "feedforward" after every feed-forward, "both" after every attention too, "parallel" beside every
        feed-forward.  With `targets`, after the modules named there, or beside them; where a feed-forward is no module
        of its own (BERT, BART, OPT), "parallel" takes its first layer and its last as one.
    scale: s.   dropout: probability of dropping a hidden feature of the adapter while training.   bias: have d and u.
    """

    reduction_factor: float = 16
    width: int | None = None
    non_linearity: NonLinearity = "relu"
    placement: Placement = "feedforward"
    scale: float = 1.0
    dropout: float = 0.0
    bias: bool = True

    summary = "y' = y + s U f(D y)"
    paper = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021, arXiv:2110.04366"
    disk = DiskNames(
        "SMIDGEN_BOTTLENECK",
        tensors={
            "down": "adapter_down.weight",
            "down_bias": "adapter_down.bias",
            "up": "adapter_up.weight",
            "up_bias": "adapter_up.bias",
        },
    )

    def check(self) -> None:
        require(self.reduction_factor > 0, f"reduction_factor is {self.reduction_factor}; it must be above 0")
        require(self.width is None or self.width > 0, f"width is {self.width}; it must be at least 1")
        require(math.isfinite(self.scale), f"scale is {self.scale}; it must be a finite number")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name, kind in (("non_linearity", NonLinearity), ("placement", Placement)):
            value, known = getattr(self, name), get_args(kind)
            require(value in known, f'{name} is "{value}"; it is one of {", ".join(known)}')

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "a bottleneck adapter acts on a call, not on a parameter; name the module (for attention, the attention itself)"
        if self.placement == "parallel" and self._fans(site) is None:
            return "an adapter beside a module acts on linear layers and feed-forwards"
        if self._fans(site) is None:
            return f"how many features {type(site.layer).__name__} gives cannot be told; name the last layer in it"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        paths: list[str] = []
        for part in feedforwards(model):
            beside = [part.path] if part.whole else [part.inputs[0], part.output]
            paths += beside if self.placement == "parallel" else [part.output]
        if self.placement == "both":  # nn.MultiheadAttention never calls its output layer: after the attention itself
            paths += [part.output if part.query else part.path for part in attentions(model)]
        if not paths:
            raise not_recognised(model, "feed-forward", 'Bottleneck(targets=["*.fc2"])')
        return paths, {}

    def build(self, site: Site) -> "BottleneckAdapter":
        if self.placement != "parallel":
            return AfterLayer(self, site) if site.kind else AfterModule(self, site)
        if site.kind and (half := feedforward_half(site.path)):
            return BesideInput(self, site, half[1]) if half[0] == "input" else BesideOutput(self, site, half[1])
        takes_one = site.kind or len(inspect.signature(site.layer.forward).parameters) == 1
        return Beside(self, site) if takes_one else BesideModule(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "HandOver | None":
        if self.placement != "parallel":
            return None
        halves: dict[str, dict[str, Site]] = {}
        for site in sites:
            if site.kind and (half := feedforward_half(site.path)):
                halves.setdefault(half[1], {})[half[0]] = site
        bad = [
            ", ".join(site.path for site in pair.values())
            for pair in halves.values()
            if len(pair) < 2 or pair["input"].fan_in != pair["output"].fan_out
        ]
        if bad:
            raise TargetError(
                f"beside {len(bad)} feed-forwards one of two ends is missing, or they differ in width: {'; '.join(bad[:5])}. "
                "Name the first layer and the last of each, or the module that is the whole feed-forward"
            )
        return HandOver() if halves else None

    def width_at(self, fan: int) -> int:
        """W where the adapter reads, or gives, `fan` features."""
        return self.width or max(1, round(fan / self.reduction_factor))

    def _fans(self, site: Site) -> tuple[int, int] | None:
        """(I, O) of the adapter at this site, or None if it cannot be there."""
        if site.kind is None:
            whole = next((part for part in feedforwards(site.layer) if not part.path and part.whole), None)
            if self.placement == "parallel":
                return whole and (site.layer.get_submodule(whole.inputs[0]), )  # type: ignore
        return None
