"""DoRA in Hugging Face PEFT's folder: LoRA's, and lora_magnitude_vector: (O,), of a convolution (1, O, *1)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .peft_lora import LoRATranslation
from .translation import Found, Shapes


class DoRATranslation(LoRATranslation):
    """DoRA on layers; HF PEFT has none for parameters."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        named = [site.name for site in sites if site.parameter]
        return f"{named[0]}: HF PEFT has no DoRA for parameters" if named else super().obstacle(modules, method, sites)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return {**super().fields(modules, method, sites), "use_dora": True}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return super().stored_peft(method, sites, tensors) + [_magnitude(site) for site in sites]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        return super().find(modules, {**config, "use_dora": False}, shapes)


def _magnitude(site: Site) -> Stored:
    key, holds = f"{PREFIX}{clean(site.path)}.lora_magnitude_vector", ((site.name, "magnitude"),)
    if not isinstance(site.kind, ConvKind):
        return Stored(key, holds)
    ones = (1,) * (site.stored.ndim - 2)

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].view(1, -1, *ones)

    return Stored(key, holds, pack, lambda tensor: (tensor.flatten(),))
