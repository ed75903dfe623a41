"""Side networks: where a small network a stands in a transformer, whatever it computes, and when it is left out.

    placement       where                                              what the call gives
    "feedforward"   after every feed-forward                           y + a(y)
    "both"          after every attention and every feed-forward       y + a(y)          Houlsby et al. 2019, section 2
    "normed"        at the norm N after every feed-forward             N(z + a(N(z)))    Pfeiffer et al. 2020, eq. 1
    "parallel"      beside every feed-forward, which makes y from x    y + a(x)          He et al. 2021, section 3.3

z is what the norm is given, the feed-forward and its residual.  The others act before the residual is added.
arXiv:1902.00751, arXiv:2005.00052 (MAD-X), arXiv:2110.04366.   Leaving out: AdapterDrop, Rücklé et al. 2021,
arXiv:2010.11918, section 3.
"""

import inspect
from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import nn

from .adapter import Adapter
from .blocks import attentions, feedforward_half, feedforwards, not_recognised, output_width
from .checks import require_one_of, require_whole
from .errors import TargetError
from .layers import LinearKind, NormKind
from .method import Method
from .side_places import (
    After,
    AfterModule,
    AtNorm,
    Beside,
    BesideModule,
    FirstLayer,
    LastLayer,
    Network,
    Together,
    block_of,
)
from .site import Site

Placement = Literal["feedforward", "both", "normed", "parallel"]
# the output layer of a feed-forward whose residual is added before a norm -> that norm
_NORMS = {"output.dense": "output.LayerNorm", "ffn_output": "full_layer_layer_norm", "ffn.lin2": "output_layer_norm"}


@dataclass(frozen=True, kw_only=True)
class SideNetworks(Method):
    """A method that puts small networks into a transformer.

    placement: "feedforward" after every feed-forward, "both" after every attention too, "normed" at the norm after
        every feed-forward, "parallel" beside every feed-forward.  With `targets`, at the modules named there: norms, or
        what to be after or beside.  Beside a feed-forward that is no module of its own (BERT, BART, OPT), name its
        first layer and its last.
    drop_first: leave out the first blocks, as AdapterDrop does: while training as many as is drawn for every call, from
        none to this (the very first leaves out none), otherwise this many, or what `leave_out` says.
    """

    placement: Placement = "feedforward"
    drop_first: int = 0

    def check(self) -> None:
        require_one_of(self, "placement", get_args(Placement))
        require_whole(self, "drop_first", least=0)

    def network(self, site: Site, fan_in: int, fan_out: int) -> Network:
        """a for one site, its parameters uninitialised; a width of 0 where that half lives elsewhere."""
        raise NotImplementedError

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return f"a {self.name} acts on a call, not on a parameter; name the module that reads the parameter"
        if site.kind is None and output_width(site.layer) is None:
            return f"how many features {type(site.layer).__name__} gives cannot be told; name the last layer in it"
        if isinstance(site.kind, NormKind) and (self.placement != "normed" or not _features_last(site.layer)):
            return 'it is a norm; put the adapter after the layer before it, or say placement="normed"'
        whole = site.kind is None and any(part.whole and not part.path for part in feedforwards(site.layer))
        if self.placement == "parallel" and not (whole or isinstance(site.kind, LinearKind)):
            return "an adapter beside a module acts on linear layers and whole feed-forwards"
        if self.placement == "normed" and not (site.kind is None or isinstance(site.kind, NormKind)):
            return "it gives no normed hidden state; name the norm after it, or a block"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        paths: list[str] = []
        for part in feedforwards(model):
            if self.placement == "parallel":
                paths += [part.path] if part.whole else [part.inputs[0], part.output]
            elif self.placement == "normed":
                paths += _norm_after(model, part.output)
            else:
                paths.append(part.output)
        if self.placement == "both":  # nn.MultiheadAttention never calls its output layer: after the attention itself
            paths += [part.output if part.query else part.path for part in attentions(model)]
        if not paths:
            what = "norm after a feed-forward" if self.placement == "normed" else "feed-forward"
            raise not_recognised(model, what, f'{type(self).__name__}(targets=["*.fc2"])')
        return paths, {}

    def build(self, site: Site) -> Adapter:
        width = site.fan_out if site.kind else cast(int, output_width(site.layer))
        if self.placement == "parallel" and site.kind:
            half = feedforward_half(site.path)
            if half is None:
                return Beside(site, self.network(site, site.fan_in, width))
            end, owner = half
            if end == "input":
                return FirstLayer(site, self.network(site, site.fan_in, 0), owner)
            return LastLayer(site, self.network(site, 0, width), owner)
        net = self.network(site, width, width)
        if self.placement == "parallel":
            takes_one = len(inspect.signature(site.layer.forward).parameters) == 1
            return (Beside if takes_one else BesideModule)(site, net)
        if isinstance(site.kind, NormKind):
            return AtNorm(site, net)
        return (After if site.kind else AfterModule)(site, net)

    def shared(self, sites: tuple[Site, ...]) -> "Together | None":
        halves: dict[str, dict[str, Site]] = {}
        for site in sites if self.placement == "parallel" else ():
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
        numbers = {block_of(site) for site in sites}
        if self.drop_first and self.drop_first > max(numbers):
            raise TargetError(f"drop_first={self.drop_first} would leave out all of the {len(numbers)} blocks")
        return Together(sites, self.drop_first) if halves or self.drop_first else None


def _features_last(norm: nn.Module) -> bool:
    return (isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1) or "RMSNorm" in type(norm).__name__


def _norm_after(model: nn.Module, output: str) -> list[str]:
    """The norm that reads a feed-forward's output with its residual, where the architecture is known to have that."""
    modules = dict(model.named_modules())
    if output.endswith("linear2"):
        block = output.rpartition(".")[0]
        layer = modules[block]
        post = isinstance(layer, nn.TransformerEncoderLayer) and not layer.norm_first
        return [f"{block}.norm2".lstrip(".")] if post else []
    found = [output.removesuffix(end) + norm for end, norm in _NORMS.items() if output.endswith(end)]
    return [path for path in found if path in modules]
