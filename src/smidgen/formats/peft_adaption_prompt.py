"""LLaMA-Adapter in Hugging Face PEFT's folder: the same tensors at the topmost attentions."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.adaption_prompt import AdaptionPrompt
from .layout import PREFIX, Modules, Stored, Tensors, clean, stored_tensors
from .translation import Found, PeftTranslation, Shapes, number, refuse_unknown

_ATTENTIONS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # of the model types that HF PEFT has


class AdaptionPromptTranslation(PeftTranslation):
    """Prompts beside the attentions of Llama, Mistral and GPT-2."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        kind = _model_type(modules.model)
        if kind not in _ATTENTIONS:
            return f"HF PEFT has no adaption prompt for models of type {kind}"
        if cast(AdaptionPrompt, method).projected == (kind == "gpt2"):
            return "HF PEFT leaves the output layer out on GPT-2, and there only (projected)"
        every = [path for path in modules if path.endswith("." + _ATTENTIONS[kind])]
        if [clean(site.path) for site in sites] != every[len(every) - len(sites) :]:
            return "HF PEFT's adaption prompts are in the topmost attentions"
        return _differs(sites[0].layer)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        name = clean(sites[0].path).rpartition(".")[2]
        length = cast(AdaptionPrompt, method).length
        return {"adapter_len": length, "adapter_layers": len(sites), "target_modules": name}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return stored_tensors(method.disk, sites, tensors)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        refuse_unknown(config, frozenset({"adapter_len", "adapter_layers"}))
        sites = tuple(modules.site(path) for path in modules if f"{PREFIX}{path}.adaption_gate" in shapes)
        if sites and (reason := _differs(sites[0].layer)):
            raise FolderError(reason)
        settings = {"length": number(config, "adapter_len", whole=True), "layers": len(sites)}
        return Found({**settings, "projected": _model_type(modules.model) != "gpt2"}, sites)


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _differs(attention: nn.Module) -> str | None:
    """What HF PEFT computes otherwise at this attention, or None."""
    if getattr(getattr(attention, "o_proj", None), "bias", None) is not None:
        return "HF PEFT adds the bias of the output layer a second time"
    config: Any = attention.config
    if config.hidden_size // config.num_attention_heads != getattr(attention, "head_dim", 0):
        return "HF PEFT takes the heads to be as wide as the model divided by their number"
    return None
