"""Poly in Hugging Face PEFT's folder: the same tensors; the model itself, which is told the tasks, has none."""

from collections.abc import Mapping
from typing import Any

from .layers_only import LayersOnly
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class PolyTranslation(LayersOnly, DeclaredTranslation):
    """Skills and routes of linear layers."""

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        several = found.settings["tasks"] != 1 and found.sites
        return Found(found.settings, (*([modules.site("")] if several else []), *found.sites))
