"""Poly in Hugging Face PEFT's folder: the same tensors; the model itself, which is told the tasks, has none."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.method import Method
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class PolyTranslation(DeclaredTranslation):
    """Skills and routes of linear layers."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return super().obstacle(modules, method, _layers(sites))

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return super().fields(modules, method, _layers(sites))

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return super().stored_peft(method, _layers(sites), tensors)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        several = found.settings["tasks"] != 1 and found.sites
        return Found(found.settings, (*([modules.site("")] if several else []), *found.sites))


def _layers(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.path]
