"""Of methods with a site at the model, which tells the others something, HF PEFT's layout has the layers alone."""

from collections.abc import Sequence
from typing import Any

from ..core.method import Method
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .translation import PeftTranslation


class LayersOnly(PeftTranslation):
    """Stands before another translation, to which it hands the layers."""

    def settings(self, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return super().settings(method, _layers(sites))

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return super().obstacle(modules, method, _layers(sites))

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return super().fields(modules, method, _layers(sites))

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return super().stored_peft(method, _layers(sites), tensors)


def _layers(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.path]
