"""WaveFT in Hugging Face PEFT's folder: the same tensors, whose sizes say how many coefficients each site has."""

from collections.abc import Mapping
from typing import Any

from ..core.errors import FolderError
from .layout import PREFIX, Modules, clean
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes, exact_names


class WaveFTTranslation(DeclaredTranslation):
    """WaveFT on linear layers."""

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        if config.get("wavelet_family") in ("coif4", "coif5"):
            raise FolderError(
                f"wavelet_family is {config['wavelet_family']!r}: HF PEFT's table of it (0.21) is not an orthogonal "
                "wavelet. Merge the adapter with HF PEFT, or train it with another family"
            )
        found = super().find(modules, config, shapes)
        counts = {site.name: shapes[f"{PREFIX}{clean(site.path)}.waveft_spectrum"][0] for site in found.sites}
        pattern = exact_names(counts, found.settings["frequencies"])
        return Found({**found.settings, "frequencies_pattern": pattern}, found.sites)
