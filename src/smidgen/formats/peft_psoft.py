"""PSOFT in Hugging Face PEFT's folder: the same tensors; their series has the same sum for 3 terms as for 4."""

from collections.abc import Mapping
from typing import Any

from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class PSOFTTranslation(DeclaredTranslation):
    """PSOFT on linear layers."""

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        if found.settings["terms"] == 3:
            found.settings["terms"] = 4
        return found
