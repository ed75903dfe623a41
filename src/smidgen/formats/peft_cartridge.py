"""Cartridges in Hugging Face PEFT's folder: one tensor (N, layers 2 D), K and V of each layer, frozen rows first."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..core.method import Method
from ..core.site import Site
from ..methods.cartridge import Cartridge
from .layout import Modules, Stored, Tensors
from .peft_fields import PROMPTS
from .peft_prefix_tuning import one_width_everywhere, sizes_of
from .peft_prompts import KEY, length_of
from .translation import Found, PeftTranslation, Shapes, number

_NAMES = ("fixed_K", "K", "fixed_V", "V")


class CartridgeTranslation(PeftTranslation):
    """A cartridge of one width in all layers of a decoder."""

    prefix = "base_model."
    needs_task = True

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return one_width_everywhere(modules, sites)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        method = cast(Cartridge, method)
        own = {"num_virtual_tokens": method.length, "num_frozen_tokens": method.frozen}
        return {**sizes_of(modules, sites), **own}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        holds = tuple((site.name, name) for site in sites if site.path for name in _NAMES)
        frozen = cast(Cartridge, method).frozen

        def apart(tensor: Tensor) -> Sequence[Tensor]:
            columns = tensor.chunk(len(holds) // 2, dim=1)
            return [part for column in columns for part in (column[:frozen], column[frozen:])]

        return [Stored(KEY, holds, _together, apart)]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        length = length_of(config, PROMPTS | {"num_frozen_tokens"})
        settings = {"length": length, "frozen": number(config, "num_frozen_tokens", whole=True)}
        return Found(settings, Cartridge(**settings).resolve(modules.model).sites)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return torch.cat([torch.cat(pair) for pair in pairs], dim=1)  # (N, layers 2 D)
