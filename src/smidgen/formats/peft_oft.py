"""OFT in Hugging Face PEFT's folder: the same tensors, embeddings' by another name; convolutions may be wrong.

Their forward turns overlapping patches of an image and adds them up, which is no rotation of the weight: it is one only
where the kernel is 1 x 1.  Their series has the same sum for 3 terms as for 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from ..core.errors import FolderError
from ..core.layers import ConvKind, EmbeddingKind
from ..core.method import Method
from ..core.site import Site
from ..methods.oft import OFT
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class OFTTranslation(DeclaredTranslation):
    """OFT on linear layers, embeddings and 1 x 1 convolutions."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return super().obstacle(modules, method, sites) or next(
            (f"{site.name}: HF PEFT has no right OFT for this convolution" for site in sites if _wrong(site)), None
        )

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        if cast(OFT, method).blocks:  # one of the two has to be 0
            method = replace(cast(OFT, method), block_size=0)
        return super().fields(modules, method, sites)

    def key(self, site: Site, name: str) -> str:
        key = super().key(site, name)
        return key.replace(".oft_R.", ".oft_embedding_R.") if isinstance(site.kind, EmbeddingKind) else key

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        wrong = [site.name for site in found.sites if _wrong(site)]
        if wrong:
            raise FolderError(
                f"HF PEFT's OFT on convolutions of more than 1 x 1 turns overlapping patches, which no weight does: "
                f"{', '.join(wrong[:5])} would mean something else here. Train it again with smidgen"
            )
        if found.settings["terms"] == 3:
            found.settings["terms"] = 4
        return found

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        return super().sites(modules, {key.replace(".oft_embedding_R.", ".oft_R."): shapes[key] for key in shapes})


def _wrong(site: Site) -> bool:
    if not isinstance(site.kind, ConvKind):
        return False
    layer = site.layer
    return not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or layer.groups != 1
