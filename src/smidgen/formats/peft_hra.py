"""HRA in Hugging Face PEFT's folder: the same tensor; not all convolutions are right.

Their forward leaves out the dilation and the padding mode of a convolution and takes its height for its width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..core.errors import FolderError
from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class HRATranslation(DeclaredTranslation):
    """HRA on linear layers and square convolutions."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return super().obstacle(modules, method, sites) or next(
            (f"{site.name}: HF PEFT's {self.peft_type} is wrong there" for site in sites if _wrong(site)), None
        )

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        wrong = [site.name for site in found.sites if _wrong(site)]
        if wrong:
            raise FolderError(
                f"HF PEFT's {self.peft_type} takes a convolution for a square one that is neither dilated nor padded "
                f"otherwise than with zeros; {', '.join(wrong[:5])} would mean something else here. "
                "Train it again with smidgen"
            )
        return found


def _wrong(site: Site) -> bool:
    if not isinstance(site.kind, ConvKind):
        return False
    layer = site.layer
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.padding_mode != "zeros":
        return True
    square = (layer.kernel_size, layer.stride, layer.padding)
    return layer.dilation != (1, 1) or any(isinstance(pair, str) or pair[0] != pair[1] for pair in square)
