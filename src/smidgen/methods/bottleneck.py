"""Bottleneck adapter: a small network after a layer, or beside it.  Houlsby et al. 2019, arXiv:1902.00751, section 2.

    y' = y + s (U f(D y + d) + u)       after a module that gives y
    y' = y + s (U f(D x + d) + u)       beside a feed-forward that makes y from x (parallel)

D "down": (W, I)   U "up": (O, W)   d: (W,)   u: (O,)   I, O = features read and given, equal in a transformer,
W = width = I / reduction_factor, f = non-linearity, s = scale.   U and u start at zero, so training starts from the
base model.   Trainable parameters: W (I + O) + W + O per place.

    placement       where                                                    after
    "feedforward"   the output layer of every feed-forward                   Pfeiffer et al. 2020, arXiv:2005.00247
    "both"          of every attention and feed-forward                      Houlsby et al. 2019
    "parallel"      beside every feed-forward; the authors' s is 4           He et al. 2021, arXiv:2110.04366

All act before the residual is added and normalised.
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
        feed-forward.  With `targets`, after (or beside) the modules named there.  Beside a feed-forward that is no
        module of its own (BERT, BART, OPT), name its first layer and its last.
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
    paper = "Houlsby et al. 2019, arXiv:1902.00751"
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
            return "a bottleneck adapter acts on a call, not on a parameter; name the module that reads the parameter"
        if site.kind is None and output_width(site.layer) is None:
            return f"how many features {type(site.layer).__name__} gives cannot be told; name the last layer in it"
        if isinstance(site.kind, NormKind):
            return "it is a norm; put the adapter after the layer before it"
        whole = site.kind is None and any(part.whole and not part.path for part in feedforwards(site.layer))
        if self.placement == "parallel" and not (whole or isinstance(site.kind, LinearKind)):
            return "an adapter beside a module acts on linear layers and whole feed-forwards"
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
        width = site.fan_out if site.kind else cast(int, output_width(site.layer))
        if self.placement != "parallel":
            return (After if site.kind else AfterModule)(self, site, width, width)
        if site.kind and (half := feedforward_half(site.path)):
            end, owner = half
            return FirstLayer(self, site, owner) if end == "input" else LastLayer(self, site, owner)
        if site.kind:
            return Beside(self, site, site.fan_in, width)
        takes_one = len(inspect.signature(site.layer.forward).parameters) == 1
        return (Beside if takes_one else BesideModule)(self, site, width, width)

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
                f"{len(bad)} feed-forwards have one end only, or ends that differ in width: {'; '.join(bad[:5])}. "
                "Name the first layer and the last of each, or the module that is the whole feed-forward"
            )
        return HandOver() if halves else None


class BottleneckAdapter(Adapter):
    """D, d, U, u at one place; fan_in or fan_out is 0 where the other half lives elsewhere."""

    mergeable = False

    def __init__(self, method: Bottleneck, site: Site, fan_in: int, fan_out: int) -> None:
        super().__init__(site)
        width = method.width or max(1, round((fan_in or fan_out) / method.reduction_factor))
        self.f, self.scale, self.dropout = _FUNCTIONS[method.non_linearity], method.scale, method.dropout
        if fan_in:
            self.down = site.empty(width, fan_in)
            self.down_bias = site.empty(width) if method.bias else None
        if fan_out:
            self.up = site.empty(fan_out, width)
            self.up_bias = site.empty(fan_out) if method.bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name == "down":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)  # as nn.Linear starts
            else:
                nn.init.zeros_(parameter)

    def hidden(self, x: Tensor) -> Tensor:
        """f(D x + d): (..., I) -> (..., W)."""
        h = self.f(F.linear(x, self.down.to(x.dtype), None if self.down_bias is None else self.down_bias.to(x.dtype)))
        return F.dropout(h, self.dropout) if self.training and self.dropout else h

    def expanded(self, h: Tensor) -> Tensor:
        """s (U h + u): (..., W) -> (..., O)."""
        bias = None if self.up_bias is None else self.up_bias.to(h.dtype)
        return F.linear(h, self.up.to(h.dtype), bias) * self.scale


class After(BottleneckAdapter):
    """After a layer."""

    def __init__(self, method: Bottleneck, site: Site, fan_in: int, fan_out: int) -> None:
        super().__init__(method, site, fan_in, fan_out)
        one = torch.ones(fan_out)
        self.axis = -site.channels(one, one).ndim if site.kind else -1  # of the channels: not the last in a convolution

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out  # an attention's first output is the hidden state
        change = self.expanded(self.hidden(y.movedim(self.axis, -1) if self.axis != -1 else y))
        y = torch.add(y, (change.movedim(-1, self.axis) if self.axis != -1 else change).to(y.dtype))
        return (y, *out[1:]) if isinstance(out, tuple) else y


class AfterModule(After):
    """After a block or an attention, which is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


class Beside(BottleneckAdapter, AdditiveAdapter):
    """Beside a linear layer or a whole feed-forward."""

    def delta(self, x: Tensor) -> Tensor:
        return self.expanded(self.hidden(x))


class BesideModule(Beside):
    """Beside a feed-forward that is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


class HandOver(Shared):
    """What the first layer of each feed-forward has for the last: f(D x + d), by the path of the feed-forward.

    Filled and emptied within one call of the block.  A call that fails between the two is overwritten by the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: dict[str, Tensor] = {}

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: it has no parameters."""


class FirstLayer(BottleneckAdapter, AdditiveAdapter):
    """D and d at the first layer of a feed-forward that is no module of its own; its output stays as it is."""

    by_row = False  # one slot, so one group of rows at a time

    def __init__(self, method: Bottleneck, site: Site, owner: str) -> None:
        super().__init__(method, site, site.fan_in, 0)
        self.owner = owner

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.delta(x)
        return call(x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        cast(HandOver, self.shared).hidden[self.owner] = self.hidden(x)
        return x.new_zeros(())


class LastLayer(BottleneckAdapter, AdditiveAdapter):
    """U and u at the last layer of that feed-forward."""

    by_row = False

    def __init__(self, method: Bottleneck, site: Site, owner: str) -> None:
        super().__init__(method, site, 0, site.fan_out)
        self.owner = owner

    def delta(self, x: Tensor) -> Tensor:
        return self.expanded(cast(HandOver, self.shared).hidden.pop(self.owner))
