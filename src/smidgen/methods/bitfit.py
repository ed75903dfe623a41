"""BitFit: train the biases only.  Ben Zaken et al. 2021, arXiv:2106.10199, section 3.

    b' = b + c

c: (O,), the change of the bias, starts at zero, so training starts from the base model, whose own biases stay as they
are.   O = number of output channels.   Trainable parameters: O per bias.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.layers import kind_of
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution, head_modules, modules_of


@method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases, by default all of the model's body.  So few numbers want a learning rate of about 1e-3."""

    summary = "b' = b + c"
    paper = "Ben Zaken et al. 2021, arXiv:2106.10199"
    disk = DiskNames("SMIDGEN_BITFIT", tensors={"change": "bias"})

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return None if site.stored.ndim == 1 else f"{site.parameter} is no vector; BitFit trains biases"
        if site.kind is None or site.bias is None:
            return f"this {type(site.layer).__name__} has no bias that its call adds"
        return None

    def resolve(self, model: nn.Module) -> Resolution:
        """All biases of the body: those that layers add when called, and those that other modules read themselves."""
        if not self.targets.is_auto:
            return super().resolve(model)
        sites: list[Site] = []
        left_out: list[tuple[str, str]] = []
        head = head_modules(model)
        for path, module in modules_of(model):
            for site in _biases(path, module):
                if self.is_in_heads(model, path):
                    left_out.append((site.name, "trained whole, as a head"))
                elif any(path == h or path.startswith(h + ".") for h in head):
                    left_out.append((site.name, "part of the head"))
                else:
                    sites.append(site)
        require(
            bool(sites),
            f"{type(model).__name__} has no biases in its body, so BitFit has nothing to train; use another method",
            TargetError,
        )
        return Resolution(model, tuple(sites), tuple(left_out))

    def build(self, site: Site) -> "BitFitAdapter":
        return BitFitAdapter(site)


def _biases(path: str, module: nn.Module) -> list[Site]:
    """The sites of a module's own biases.  nn.MultiheadAttention reads its output layer's without calling it."""
    if kind_of(module) is not None:
        uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        return [] if uncalled or getattr(module, "bias", None) is None else [Site.at(path, module)]
    names = [name for name, p in module.named_parameters(recurse=False) if name.endswith("bias") and p.ndim == 1]
    if isinstance(module, nn.MultiheadAttention) and module.out_proj.bias is not None:
        names.append("out_proj.bias")
    return [Site.at(path, module, name) for name in names]


class BitFitAdapter(AdditiveAdapter):
    """c at one site."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.change = site.empty(site.fan_out)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.change)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return torch.add(y, self.site.channels(self.change, y))

    def delta(self, x: Tensor) -> Tensor:
        c = self.site.channels(self.change, x)
        return c.expand(len(x), *[1] * (x.ndim - c.ndim - 1), *c.shape) if x.ndim > c.ndim else c  # a row per row of x

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        c = self.change[rows].to(W.dtype)
        return (W + c[:, None], None) if self.site.parameter else (W, None if b is None else b + c)
