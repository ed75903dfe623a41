"""Prefix tuning in Hugging Face PEFT's folder: one tensor (N, layers 2 D), K and V of each layer in order.

Their prefix sits in the cache, so that real tokens stand N positions later: our `shift_positions`.  Without it the
numbers differ, and the prefix is written in our own layout.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import widths_of
from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.prefix_tuning import PrefixTuning
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prompts import KEY, length_of, result_of, stored_with_result, text_config
from .translation import Found, PeftTranslation, Shapes


class PrefixTuningTranslation(PeftTranslation):
    """A prefix of one width in all layers of a decoder."""

    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        method = cast(PrefixTuning, method)
        if not method.shift_positions:
            return "HF PEFT's prefixes shift the positions of real tokens, this one does not (shift_positions)"
        return one_width_everywhere(modules, sites)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return {**sizes_of(modules, sites), "num_virtual_tokens": cast(PrefixTuning, method).length}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        layers = [site for site in sites if site.path]
        if cast(PrefixTuning, method).reparametrisation is not None:
            return self._with_mlp(method, sites, tensors)
        holds = tuple((site.name, name) for site in layers for name in ("K", "V"))
        return [Stored(KEY, holds, _side_by_side, partial(_apart, count=len(holds)))]

    def _with_mlp(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        shared = [name for name in tensors[sites[0].name] if name.startswith("shared.")]
        hidden = result_of(method, sites, shared)

        def made(held: Mapping[tuple[str, str], Tensor]) -> Tensor:
            h = hidden([held[sites[0].name, name] for name in shared])  # (N, M)
            layers = [site.name for site in sites if site.path]
            return torch.cat([F.linear(h, held[name, "weight"], held[name, "bias"]) for name in layers], dim=1)

        return stored_with_result(KEY, method, sites, tensors, made)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        if config.get("num_transformer_submodules") == 2:
            raise FolderError(
                "num_transformer_submodules is 2: of encoder-decoders HF PEFT uses half of the tensor, in the "
                "decoder's self-attention, and not in the order of its layers. Train it for all attentions"
            )
        # a projected prefix is written as what it computes
        used = frozenset({*PROMPTS, "encoder_hidden_size", "prefix_projection"})
        length = length_of(config, used)
        sites = PrefixTuning(length=length, shift_positions=True).resolve(modules.model).sites
        return Found({"length": length, "shift_positions": True}, sites)


def one_width_everywhere(modules: Modules, sites: Sequence[Site]) -> str | None:
    """Why these attentions are not those that HF PEFT gives a prefix to, or None."""
    widths = {width for site in sites if site.path for width in widths_of(site.layer) or ()}
    everywhere = {site.path for site in PrefixTuning().resolve(modules.model).sites}
    if len(widths) != 1 or everywhere != {site.path for site in sites if site.path}:
        return "HF PEFT's prefixes are of one width and in every layer"
    return None


def sizes_of(modules: Modules, sites: Sequence[Site]) -> dict[str, Any]:
    """HF PEFT's fields that say the size of a prefix at these attentions."""
    layers = [site for site in sites if site.path]
    config = text_config(modules.model)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    return {
        "token_dim": (widths_of(layers[0].layer) or (0, 0))[0],
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), dim=1)  # K, V, K, V, ... (N, layers 2 D)


def _apart(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return tensor.chunk(count, dim=1)
