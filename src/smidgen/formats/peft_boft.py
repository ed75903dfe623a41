"""BOFT in Hugging Face PEFT's folder: the scale of a convolution lies the other way, and the tensors say the factors.

HF PEFT trains one butterfly factor, whatever was asked for, where its CUDA extension cannot be built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ..core.errors import FolderError
from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from ..methods.boft import BOFT
from .layout import Modules, Stored, Tensors
from .peft_hra import HRATranslation
from .translation import Found, Shapes


class BOFTTranslation(HRATranslation):
    """BOFT on linear layers and square convolutions; the others are wrong there as HRA's are."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        if cast(BOFT, method).blocks:  # one of the two has to be 0
            method = replace(cast(BOFT, method), block_size=0)
        return super().fields(modules, method, sites)

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        lying = {site.name for site in sites if isinstance(site.kind, ConvKind)}
        return [
            replace(part, pack=lambda s: s[0].T.contiguous(), unpack=lambda s: (s.T,))
            if part.holds[0][0] in lying and part.holds[0][1] == "s"
            else part
            for part in super().stored_peft(method, sites, tensors)
        ]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        factors = {shape[0] for key, shape in shapes.items() if key.endswith(".boft_R") and len(shape) == 4}
        if len(factors) != 1:
            raise FolderError(f"boft_R has {sorted(factors)} butterfly factors; it is (factors, blocks, size, size)")
        found.settings["factors"] = factors.pop()
        return found
