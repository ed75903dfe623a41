"""LLaMA-Adapter V2: a scale and a bias for every layer, and prompts in the topmost.  Gao et al. 2023, arXiv:2304.15010,
section 4.1, equation 3.

    y' = s * (W x + b0 + t)                    s, t: (O,)       at linear layers and norms
    W' = diag(s) W     b' = s * (b0 + t)

O = output channels.   s starts at 1, t at 0, and the gates of the prompts (adaption_prompt.py) at 0, so training starts
from the base model.   Trainable parameters: 2 O per layer, and N E + 1 per attention with a prompt.

The paper's early fusion gives the first layers the tokens of an image; a model without images has nothing of it but the
place, which is `early`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import NotMergeable
from ..core.layers import LinearKind, NormKind, kind_of
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import body_layers, modules_of
from .adaption_prompt import PromptBeside, accepts_prompt, self_attentions, topmost


@method("llama_adapter_v2")
@dataclass(frozen=True, kw_only=True)
class LLaMAAdapterV2(Method):
    """A scale and a bias for every linear layer and norm of the body, and prompts beside attentions.

    length: N, of the prompts.
    layers: how many of the topmost self-attentions get a prompt; None is all, 0 is none.
    early: the first ones instead of the topmost.
    """

    length: int = 10
    layers: int | None = None
    early: bool = False

    summary = "y' = s * (W x + b + t), and prompts beside attentions"
    paper = "Gao et al. 2023, arXiv:2304.15010"
    disk = DiskNames("SMIDGEN_LLAMA_ADAPTER_V2")

    def check(self) -> None:
        require_whole(self, "length")
        require_whole(self, "layers", least=0)

    def accepts(self, site: Site) -> str | None:
        if site.kind is None:
            return accepts_prompt(site)
        if not isinstance(site.kind, LinearKind | NormKind) or site.parameter is not None:
            return f"{type(site.layer).__name__} is no linear layer or norm whose call could be scaled"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        layers, left_out = body_layers(model)
        norms = [path for path, module in modules_of(model) if isinstance(kind_of(module), NormKind)]
        paths = self_attentions(model)
        count = topmost(self.layers, model, paths)
        return [*layers, *norms, *(paths[:count] if self.early else paths[len(paths) - count :])], left_out

    def build(self, site: Site) -> Adapter:
        if site.kind is None:
            return PromptBeside(site, self.length)
        return ScaleAndBias(site) if site.bias is None else ScaleAndBiasWithin(site)


class ScaleAndBias(Adapter):
    """s and t at one layer, which may have no bias of its own that t could become part of."""

    mergeable = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.s = site.empty(site.fan_out)
        self.t = site.empty(site.fan_out)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.s)
        nn.init.zeros_(self.t)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return (y + self.site.channels(self.t, y)) * self.site.channels(self.s, y)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(f"{self.site.name} has no bias that t could become part of. Keep the adapter attached.")


class ScaleAndBiasWithin(ScaleAndBias):
    """s and t at a layer that has a bias."""

    mergeable = True

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        s, t = self.s[rows].to(W.dtype), self.t[rows].to(W.dtype)
        return s[:, None] * W, None if b is None else s * (b + t)
