"""Invertible adapter: a learned invertible map of embeddings, undone before the output layer.  Pfeiffer et al. 2020
(MAD-X), arXiv:2005.00052, section 4.3.

    NICE    y1 = x1 + F(x2)                     y2 = x2 + G(y1)                       Dinh et al. 2014, arXiv:1410.8516
    GLOW    y1 = e(s(x2)) x1 + t(x2)            y2 = e(s'(y1)) x2 + t'(y1)            Kingma & Dhariwal 2018, 1807.03039

x1, x2: the first and the last half of the features   F, G, [s t], [s' t']: networks V f(D x + d) + v of one hidden
layer   e(s) = exp(5 * 0.636 atan(s / 5)), which keeps within exp(-5) and exp(5).
An output layer that the model has reads x, as found from y.   V and v start at zero, so training starts from the base
model.   Trainable parameters: 2 (W (I + O) + W + O), I = features / 2, W = I / reduction_factor, O = I or 2 I.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.blocks import blocks, not_recognised, output_width
from ..core.checks import require_above_zero, require_one_of
from ..core.disk_names import DiskNames
from ..core.errors import TargetError
from ..core.layers import EmbeddingKind, LinearKind, kind_of
from ..core.method import Method, Shared, method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.site import Site
from ..core.targets import Resolution

Coupling = Literal["nice", "glow"]
_CLAMP = 5.0


@method("invertible")
@dataclass(frozen=True, kw_only=True)
class Invertible(Method):
    """A learned invertible map after the embeddings, and its inverse before the output layer, if there is one.

    coupling: "nice" or "glow".   reduction_factor: the networks' width is their input's divided by this.
    non_linearity: f.
    By default after the module that embeds tokens, norms and positions included, and before the model's output
    embeddings.  With `targets`, after the embedding named there, and before the linear layer, if one is named.
    """

    coupling: Coupling = "nice"
    reduction_factor: float = 2
    non_linearity: NonLinearity = "relu"

    summary = "y1 = x1 + F(x2), y2 = x2 + G(y1), undone before the output layer"
    paper = "Pfeiffer et al. 2020, arXiv:2005.00052"
    disk = DiskNames("SMIDGEN_INVERTIBLE")

    def check(self) -> None:
        require_above_zero(self, "reduction_factor")
        require_one_of(self, "coupling", get_args(Coupling))
        require_one_of(self, "non_linearity", FUNCTIONS)

    def accepts(self, site: Site) -> str | None:
        name = type(site.layer).__name__
        if site.parameter is not None:
            return "an invertible adapter acts on a call, not on a parameter"
        if isinstance(site.kind, LinearKind):
            return None
        if (site.kind is not None and not isinstance(site.kind, EmbeddingKind)) or _embedding_width(site.layer) is None:
            return f"{name} embeds no tokens; name the module that does, and the linear layer that gives the output"
        if cast(int, _embedding_width(site.layer)) < 2:
            return f"{name} gives one feature, which has no two halves"
        if output_width(site.layer) is not None:
            return f"{name} does more than embed tokens"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        paths = {id(module): path for path, module in model.named_modules()}
        words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
        if id(words) not in paths:
            raise not_recognised(model, "token embedding", 'Invertible(targets=["*.embed_tokens", "lm_head"])')
        path, inner = paths[id(words)], blocks(model)
        while "." in path:  # up to the largest module that embeds and does nothing else
            above = path.rpartition(".")[0]
            if any(block == above or block.startswith(f"{above}.") for block in inner):
                break
            path = above
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        return [path, *([paths[id(output)]] if id(output) in paths else [])], {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        outputs = [site for site in found.sites if isinstance(site.kind, LinearKind)]
        embeddings = [site for site in found.sites if site not in outputs]
        if len(embeddings) != 1 or len(outputs) > 1:
            raise TargetError(
                f"an invertible adapter goes after one embedding and before one output layer at most; {self.targets} "
                f"names {', '.join(site.name for site in found.sites)}"
            )
        return Resolution(model, (*embeddings, *outputs), found.passed_over)

    def build(self, site: Site) -> Adapter:
        if isinstance(site.kind, LinearKind):
            return Undone(site)
        return Done(site) if site.kind is not None else DoneByModule(site)

    def shared(self, sites: tuple[Site, ...]) -> "Couplings":
        width = cast(int, _embedding_width(sites[0].layer))
        wrong = [f"{site.name} reads {site.fan_in}" for site in sites[1:] if site.fan_in != width]
        if wrong:
            raise TargetError(f"{wrong[0]} features, {sites[0].name} gives {width}")
        return Couplings(self, sites[0], width)


class Couplings(Shared):
    """The map and its inverse: `first` is F, or [s t], of the last half; `last` is G, or [s' t'], of the first."""

    def __init__(self, method: Invertible, site: Site, width: int) -> None:
        super().__init__()
        self.scales, half, rest = method.coupling == "glow", width // 2, width - width // 2
        self.split = [half, rest]
        self.first = Inner(method, site, rest, half * (1 + self.scales))
        self.last = Inner(method, site, half, rest * (1 + self.scales))

    def reset(self, generator: torch.Generator | None) -> None:
        self.first.reset(generator)
        self.last.reset(generator)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.split(x, self.split, dim=-1)
        y1 = self._moved(x1, self.first(x2))
        return torch.cat((y1, self._moved(x2, self.last(y1))), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """x, where forward gives y."""
        y1, y2 = torch.split(y, self.split, dim=-1)
        x2 = self._moved(y2, self.last(y1), back=True)
        return torch.cat((self._moved(y1, self.first(x2), back=True), x2), dim=-1)

    def _moved(self, x: Tensor, by: Tensor, *, back: bool = False) -> Tensor:
        if not self.scales:
            return x - by if back else x + by
        s, t = by.chunk(2, dim=-1)
        scale = torch.exp(_CLAMP * 0.636 * torch.atan(s / _CLAMP))
        return (x - t) / scale if back else scale * x + t


class Inner(nn.Module):
    """V f(D x + d) + v."""

    def __init__(self, method: Invertible, site: Site, fan_in: int, fan_out: int) -> None:
        super().__init__()
        width = max(1, int(fan_in // method.reduction_factor))
        self.f = FUNCTIONS[method.non_linearity]
        self.down, self.down_bias = site.empty(width, fan_in), site.empty(width)
        self.up, self.up_bias = site.empty(fan_out, width), site.empty(fan_out)

    def reset(self, generator: torch.Generator | None) -> None:
        """D as nn.Linear starts, the rest at zero."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(F.linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        return F.linear(h, self.up.to(x.dtype), self.up_bias.to(x.dtype))


class Done(Adapter):
    """After the embedding.  Not to be weighted: a share of the map is not what its inverse undoes."""

    weightable = mergeable = False
    shared: Couplings

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        x = call(*args, **kwargs)
        return self.shared(x).to(x.dtype)


class DoneByModule(Done):
    """After a module that embeds more than tokens: a batch of mixed rows runs apart."""

    by_row = False


class Undone(Done):
    """Before the output layer."""

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(self.shared.inverse(x), *args, **kwargs)


def _embedding_width(module: nn.Module) -> int | None:
    """How many features the first embedding in the module gives."""
    found = (m for m in module.modules() if isinstance(kind_of(m), EmbeddingKind))
    first = next(found, None)
    return None if first is None else cast(nn.Embedding, first).embedding_dim
