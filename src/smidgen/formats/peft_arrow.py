"""Arrow in Hugging Face PEFT is made of its experts' folders by `create_arrow_model`, and has no tensors of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import Modules
from .translation import Found, PeftTranslation, Shapes

_NAMES = {"experts": "task", "general": "gks"}


class ArrowTranslation(PeftTranslation):
    """Ours is one folder with the experts in it; theirs says which adapters to load."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return "HF PEFT makes Arrow anew from the folders of its experts, and has none for the whole"

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        arrow = config.get("arrow_config")
        arrow = arrow if isinstance(arrow, dict) else {}
        names = {ours: arrow.get(f"{theirs}_adapter_names") or [] for ours, theirs in _NAMES.items()}
        said = [f"{ours}={tuple(map(str, found))!r:.200}" for ours, found in names.items() if found]
        said += [f"top_k={arrow.get('top_k', 3)!s:.20}, temperature={arrow.get('router_temperature', 1.0)!s:.20}"]
        raise FolderError(
            "is HF PEFT's router of Arrow, which has no tensors of its own that act. Load the experts' folders, each "
            f"under its name, then adapters.add(Arrow({', '.join(said)}))"
        )
