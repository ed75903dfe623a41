"""BEFT in Hugging Face PEFT's folder: our c (O,) is their beft_bias (1, O)."""

from collections.abc import Sequence

from ..core.method import Method
from ..core.site import Site
from .layout import Stored, Tensors
from .peft_declared import DeclaredTranslation


class BEFTTranslation(DeclaredTranslation):
    """BEFT on linear layers."""

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return [
            Stored(
                self.key(site, "change"),
                ((site.name, "change"),),
                lambda held: held[0][None],
                lambda tensor: (tensor[0],),
            )
            for site in sites
        ]
