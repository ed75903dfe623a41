"""LoHa in Hugging Face PEFT's folder.

layer               ours                                        theirs
Linear, Conv        A (R, I)       B (O, R)                     the same
Conv with a core    A (R, C)       B (O, R)   T (R, R, *K)      (R, C)   (R, O)   T (R, R, *K), of Conv1d (R, R, K, 1)
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from torch import Tensor, nn

from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from ..methods.loha import Lycoris
from .layout import Modules, Stored, Tensors
from .peft_declared import DeclaredTranslation


class LoHaTranslation(DeclaredTranslation):
    """LoHa on linear layers and convolutions."""

    cores: ClassVar[Mapping[str, str]] = {
        "B1": "T1",
        "B2": "T2",
    }  # with such a core B lies the other way

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        for site in sites:
            if isinstance(site.kind, ConvKind) and not site.parameter:
                layer = cast(nn.Conv2d, site.layer)
                if isinstance(layer, nn.Conv3d):
                    return f"{site.name}: HF PEFT has no {self.peft_type} for Conv3d"
                if layer.padding_mode != "zeros":
                    return f"{site.name}: not zero-padded, which HF PEFT runs as if it were"
        return super().obstacle(modules, method, sites)

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return [
            self.stored_at(cast(Lycoris, method), site, name, tensors[site.name])
            for site in sites
            for name in tensors[site.name]
        ]

    def stored_at(self, method: Lycoris, site: Site, name: str, own: Mapping[str, Tensor]) -> Stored:
        """One tensor; `own`: all those of its site."""
        key, holds = self.key(site, name), ((site.name, name),)
        kernel = method.kernel_at(site)
        if name.startswith("T") and len(kernel) == 1:
            return Stored(key, holds, lambda held: held[0].unsqueeze(-1), lambda tensor: (tensor.squeeze(-1),))
        if self.cores.get(name) in own:
            return Stored(key, holds, lambda held: held[0].T, lambda tensor: (tensor.T,))
        return Stored(key, holds)
