"""aLoRA in Hugging Face PEFT's folder: a LoRA of linear layers of a causal language model, and the tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.alora import ALoRA
from .layers_only import LayersOnly
from .layout import Modules
from .lora_variants import LoRAVariantTranslation
from .peft_fields import TASKS
from .translation import Found, Shapes


class ALoRATranslation(LayersOnly, LoRAVariantTranslation):
    """aLoRA on layers; the site at the model has no tensors."""

    field = "alora_invocation_tokens"
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        name = type(modules.model).__name__
        if next((task for end, task in TASKS.items() if name.endswith(end)), None) != "CAUSAL_LM":
            return f"HF PEFT has aLoRA for causal language models, and this is a {name}"
        return super().obstacle(modules, method, sites)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        return Found(found.settings, (*found.sites, modules.site("")) if found.sites else ())

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        return list(cast(ALoRA, method).invocation_tokens)

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        tokens = value[self.field]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise FolderError(f"{self.field} is {str(tokens)[:80]!r}, not a list of token ids")
        return {"invocation_tokens": tuple(tokens)}
