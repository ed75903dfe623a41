"""Prompt tuning in Hugging Face PEFT's folder: the prompt (N, E), which stands in front of the embedded tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.method import Method
from ..core.site import Site
from ..methods.prompt_tuning import PromptTuning
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prompts import KEY, length_of, text_config
from .translation import Found, PeftTranslation, Shapes


class PromptTuningTranslation(PeftTranslation):
    """A prompt in front of a model that is not an encoder-decoder."""

    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return None if len(sites) == 2 else "HF PEFT's prompts of encoder-decoders are of another layout"

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        config = text_config(modules.model)
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
        length = length_of(config, PROMPTS)
        return Found({"length": length}, PromptTuning(length=length).resolve(modules.model).sites)
