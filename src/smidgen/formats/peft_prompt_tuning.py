"""Prompts in Hugging Face PEFT's folder: the prompt (N, E), which stands in front of the embedded tokens.

Of encoder-decoders the tensor is (2 N, E): the first half stands in front of the encoder's tokens, the second is never
used there (num_transformer_submodules 2, its default for them).
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..core.method import Method
from ..core.prompt_method import PromptMethod
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prompts import KEY, length_of, text_config
from .translation import Found, PeftTranslation, Shapes


class PromptTuningTranslation(PeftTranslation):
    """A prompt in front of any model."""

    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        config = text_config(modules.model)
        return {
            "num_virtual_tokens": cast(PromptMethod, method).length,
            "token_dim": sites[0].fan_out,
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_transformer_submodules": submodules(sites),
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        hold = (sites[0].name, "shared.prompt")
        return [Stored(KEY, (hold,), doubled, halved) if submodules(sites) == 2 else Stored(KEY, (hold,))]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        sites = cast(PromptMethod, self.method()).resolve(modules.model).sites
        return Found(self.found(config, length_of(config, self.read_fields(), submodules=submodules(sites))), sites)

    def read_fields(self) -> frozenset[str]:
        """The fields of HF PEFT's that `found` follows, and those that say the size."""
        return PROMPTS

    def found(self, config: Mapping[str, Any], length: int) -> dict[str, Any]:
        """The settings that a config of HF PEFT's says."""
        return {"length": length}


def submodules(sites: Sequence[Site]) -> int:
    """HF PEFT's num_transformer_submodules: 2 of an encoder-decoder."""
    return len(sites) - 1  # the embedding; the model, or the encoder and the model


def doubled(tensors: Sequence[Tensor]) -> Tensor:
    """The prompt, and once more in the place of the half that is not used."""
    return torch.cat((tensors[0], tensors[0]))


def halved(tensor: Tensor) -> Sequence[Tensor]:
    """The half that is used."""
    return (tensor[: len(tensor) // 2],)
