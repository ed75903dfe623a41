"""Prompt and prefix tuning in Hugging Face PEFT's folder: one tensor, `prompt_embeddings`, that names no place.

    prompt tuning    (N, E)             in front of the embedded tokens
    prefix tuning    (N, layers 2 D)    K and V of each layer in order

Their prefix sits in the cache, so that real tokens stand N positions later: our `shift_positions`.  Without it the
numbers differ, and the prefix is written in our own layout.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..core.attention import widths_of
from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.prefix_tuning import PrefixTuning
from ..methods.prompt_tuning import PromptTuning
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .translation import Found, PeftTranslation, Shapes, number, refuse_unknown

KEY = "prompt_embeddings"


class PromptTranslation(PeftTranslation):
    """A prompt in front of a model that is not an encoder-decoder."""

    peft_type = "PROMPT_TUNING"
    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return None if len(sites) == 2 else "HF PEFT's prompts of encoder-decoders are of another layout"

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        config = _text_config(modules.model)
        return {
            "num_virtual_tokens": cast(PromptTuning, method).length,
            "token_dim": sites[0].fan_out,
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_transformer_submodules": 1,
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return [Stored(KEY, ((sites[0].name, "shared.prompt"),))]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        length = _length(config, frozenset(PROMPTS))
        return Found({"length": length}, PromptTuning(length=length).resolve(modules.model).sites)


class PrefixTranslation(PeftTranslation):
    """A prefix of one width in all layers of a decoder."""

    peft_type = "PREFIX_TUNING"
    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        method = cast(PrefixTuning, method)
        if not method.shift_positions:
            return "HF PEFT's prefixes shift the positions of real tokens, this one does not (shift_positions)"
        if method.reparametrisation is not None:
            return "it is reparametrised, and HF PEFT keeps only what that computes"
        widths = {width for site in sites if site.path for width in widths_of(site.layer) or ()}
        everywhere = {site.path for site in PrefixTuning().resolve(modules.model).sites}
        if len(widths) != 1 or everywhere != {site.path for site in sites if site.path}:
            return "HF PEFT's prefixes are of one width and in every layer"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        layers = [site for site in sites if site.path]
        config = _text_config(modules.model)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        return {
            "num_virtual_tokens": cast(PrefixTuning, method).length,
            "token_dim": (widths_of(layers[0].layer) or (0, 0))[0],
            "num_layers": len(layers),
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        layers = [site for site in sites if site.path]
        holds = tuple((site.name, name) for site in layers for name in ("K", "V"))
        return [Stored(KEY, holds, _side_by_side, partial(_apart, count=len(holds)))]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        # a projected prefix is written as what it computes
        used = frozenset({*PROMPTS, "encoder_hidden_size", "prefix_projection"})
        length = _length(config, used)
        sites = PrefixTuning(length=length, shift_positions=True).resolve(modules.model).sites
        return Found({"length": length, "shift_positions": True}, sites)


def _length(config: Mapping[str, Any], used: frozenset[str]) -> int:
    refuse_unknown(config, used)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise FolderError("num_transformer_submodules is not 1: of encoder-decoders HF PEFT's layout is another")
    return cast(int, number(config, "num_virtual_tokens", whole=True))


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), dim=1)  # K, V, K, V, ... (N, layers 2 D)


def _apart(tensor: Tensor, count: int) -> Sequence[Tensor]:
    return tensor.chunk(count, dim=1)
