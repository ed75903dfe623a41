"""LoKr in Hugging Face PEFT's folder.

    layer               ours                                      theirs
    Linear, Conv        W1, A1, B1, A2, B2                        the same
    Linear              W2 (O2, I2)                               the same
    Conv                W2 (O2, C2 K)                             (O2, C2, *K)
    Conv with a core    A2 (R, C2)   B2 (O2, R)   T2 (R, R, *K)   (R, C2)   (R, O2)   (R, R, *K), of Conv1d (R, R, K, 1)

On a Conv1d whose W2 is whole HF PEFT 0.21.2 pairs W1's axes with the wrong ones of W2, so that its change is no
Kronecker product of the layer's: such folders are refused, and ours are written in our own layout.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..core.errors import FolderError
from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from ..methods.loha import Lycoris
from ..methods.lokr import LoKr
from .layout import PREFIX, Modules, Stored, clean
from .peft_loha import LoHaTranslation
from .translation import Found, Shapes


class LoKrTranslation(LoHaTranslation):
    """LoKr on linear layers and convolutions."""

    cores: ClassVar[Mapping[str, str]] = {"B2": "T2"}

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        for site in sites:
            if isinstance(site.layer, nn.Conv1d) and cast(LoKr, method).is_whole(site):
                return f"{site.name}: W2 is whole, and HF PEFT makes something else of that on Conv1d"
        return None

    def stored_at(self, method: Lycoris, site: Site, name: str, own: Mapping[str, Tensor]) -> Stored:
        if name == "W2" and isinstance(site.kind, ConvKind):
            tail = tuple(site.stored.shape[2:])
            return Stored(
                self.key(site, name),
                ((site.name, name),),
                partial(_with_kernel, tail=tail),
                lambda tensor: (tensor.flatten(1),),
            )
        return super().stored_at(method, site, name, own)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        wrong = [
            site.name
            for site in found.sites
            if isinstance(site.layer, nn.Conv1d) and f"{PREFIX}{clean(site.path)}.lokr_w2" in shapes
        ]
        if wrong:
            raise FolderError(
                f"lokr_w2 of Conv1d layers ({', '.join(wrong[:5])}): HF PEFT 0.21 computes a change from it that is no "
                "Kronecker product of the layer's weight. Merge the adapter with HF PEFT, or train it with a lower r"
            )
        return found


def _with_kernel(tensors: Sequence[Tensor], tail: tuple[int, ...]) -> Tensor:
    return tensors[0].reshape(len(tensors[0]), -1, *tail)
