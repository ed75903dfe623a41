"""HRA in Hugging Face PEFT's folder: the same tensor; not all convolutions are right.

Their forward leaves out the dilation and the padding mode of a convolution and takes its height for its width.
"""

from torch import nn

from ..core.layers import ConvKind
from ..core.site import Site
from .peft_declared import DeclaredTranslation


class HRATranslation(DeclaredTranslation):
    """HRA on linear layers and square convolutions."""

    def unlike(self, site: Site) -> str | None:
        if not isinstance(site.kind, ConvKind) or _is_simple(site.layer):
            return None
        return f"{site.name}: HF PEFT takes it for a square convolution, not dilated and padded with zeros alone"


def _is_simple(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.padding_mode != "zeros":
        return False
    square = (layer.kernel_size, layer.stride, layer.padding)
    return layer.dilation == (1, 1) and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in square)
