"""MiSS in Hugging Face PEFT's folder: the same tensor; `init_weights` says the variant, or how theirs started."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.method import Method
from ..core.site import Site
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class MiSSTranslation(DeclaredTranslation):
    """MiSS on linear layers."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        found = super().fields(modules, method, sites)
        return found | {"init_weights": True if found["init_weights"] == "miss" else found["init_weights"]}

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        if isinstance(found.settings["variant"], bool):  # False: theirs started at random
            found.settings["variant"] = "miss"
        return found
