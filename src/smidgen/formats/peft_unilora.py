"""Uni-LoRA in Hugging Face PEFT's folder: as declared, but a file without places names no layer at all.

Then the layers are those that `target_modules` names, and the places of each follow from their order in the model.
"""

from collections.abc import Mapping
from typing import Any

from ..core.errors import FolderError
from .layout import Modules
from .ordered import OrderedTranslation
from .translation import Found, Shapes, plain


class UniLoRATranslation(OrderedTranslation):
    """Sites by the keys, or by the config."""

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        if found.sites:
            return found
        paths = _named(modules, config)
        return Found(found.settings, tuple(modules.site(path) for path in modules if path in paths))


def _named(modules: Modules, config: Mapping[str, Any]) -> set[str]:
    """The layers that the config names."""
    for field in ("layers_to_transform", "exclude_modules"):
        if config.get(field):
            raise FolderError(f"{field} is set, and no unilora_indices are there: save it with save_indices")
    ends = config.get("target_modules")
    if not isinstance(ends, list):
        raise FolderError(
            f"target_modules is {str(ends)[:80]!r}. Patterns from a file are not run: write the names it means, "
            "or save it with save_indices"
        )
    return modules.ending([plain(end, "target_modules") for end in ends])
