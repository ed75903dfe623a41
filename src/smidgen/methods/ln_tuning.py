"""LayerNorm tuning: train the norms only.  Zhao et al. 2023, arXiv:2312.11420.

    y = g' * norm(x) + b'

g', b': (C,), the adapter's own weight and bias of the norm.  They start as the base's, so training starts from the base
model, whose own stay as they are.   C = number of channels.   Trainable parameters: 2 C per LayerNorm, C per RMSNorm.
Several active at once: the last of a stack counts, for it brings whole weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.layers import NormKind, kind_of
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution, head_modules, modules_of


@method("ln_tuning")
@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Train weights and biases of norms, by default of all LayerNorms and RMSNorms of the body.

    So few numbers want a learning rate of about 1e-2, and no decay: it would pull them to 0, and the base is at 1.
    """

    summary = "y = g' * norm(x) + b'"
    paper = "Zhao et al. 2023, arXiv:2312.11420"
    disk = DiskNames("LN_TUNING")

    def accepts(self, site: Site) -> str | None:
        if not isinstance(kind_of(site.layer), NormKind):
            return f"{type(site.layer).__name__} is no norm with a weight"
        if site.parameter not in (None, "weight", "bias"):
            return f"{site.parameter} is not a parameter of the norm itself"
        return None

    def resolve(self, model: nn.Module) -> Resolution:
        """Of each norm its weight and its bias, each a site of its own; a norm may have no bias."""
        left_out: list[tuple[str, str]] = []
        if self.targets.is_auto:
            head = head_modules(model)
            norms = []
            for path, module in modules_of(model):
                if not isinstance(kind_of(module), NormKind) or has_channels_second(module):
                    continue
                if self.is_in_heads(model, path):
                    left_out.append((path, "trained whole, as a head"))
                elif any(path == h or path.startswith(h + ".") for h in head):
                    left_out.append((path, "part of the head"))
                else:
                    norms.append(Site.at(path, module))
            require(
                bool(norms),
                f"{type(model).__name__} has no LayerNorm or RMSNorm in its body; for BatchNorm and GroupNorm there is "
                "batchnorm_tuning",
                TargetError,
            )
        else:
            found = self.targets.resolve(model, self.accepts)
            norms, left_out = list(found.sites), list(found.passed_over)
        sites = [part for site in norms for part in _parameters(site)]
        return Resolution(model, tuple(sites), tuple(left_out))

    def build(self, site: Site) -> "LNTuningAdapter":
        return LNTuningAdapter(site)


def has_channels_second(module: nn.Module) -> bool:
    """True for the norms of convolutional networks."""
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def _parameters(site: Site) -> list[Site]:
    if site.parameter is not None:
        return [site]
    own = [name for name, parameter in site.layer._parameters.items() if parameter is not None]
    return [Site.at(site.path, site.layer, name) for name in own]


class LNTuningAdapter(Adapter):
    """What stands in for one parameter of a norm, in its shape."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.value = site.empty(*site.stored.shape)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        self.value.copy_(self.site.stored)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.site.linear.read_rows(self.value, rows).to(W.dtype), b
