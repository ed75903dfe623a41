"""OFT in Hugging Face PEFT's folder: the same tensors, embeddings' by another name; convolutions may be wrong.

Their forward turns overlapping patches of an image and adds them up, which is no rotation of the weight: it is one only
where the kernel is 1 x 1.  Their series has the same sum for 3 terms as for 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from ..core.layers import ConvKind, EmbeddingKind
from ..core.method import Method
from ..core.site import Site
from ..methods.oft import OFT
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes


class OFTTranslation(DeclaredTranslation):
    """OFT on linear layers, embeddings and 1 x 1 convolutions."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        if cast(OFT, method).blocks:  # one of the two has to be 0
            method = replace(cast(OFT, method), block_size=0)
        return super().fields(modules, method, sites)

    def unlike(self, site: Site) -> str | None:
        layer = site.layer
        if not isinstance(site.kind, ConvKind):
            return None
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
            return None
        return f"{site.name}: HF PEFT's OFT turns overlapping patches here, which no change of a weight does"

    def key(self, site: Site, name: str) -> str:
        key = super().key(site, name)
        return key.replace(".oft_R.", ".oft_embedding_R.") if isinstance(site.kind, EmbeddingKind) else key

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        if found.settings["terms"] == 3:
            found.settings["terms"] = 4
        return found

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        return super().sites(modules, {key.replace(".oft_embedding_R.", ".oft_R."): shapes[key] for key in shapes})
