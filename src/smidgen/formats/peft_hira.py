"""HiRA in Hugging Face PEFT's folder: as declared, with LoRA's shapes on convolutions and its own names on embeddings.

    layer                ours                      theirs
    Linear, Conv1D       A (R, I)    B (O, R)      hira_A (R, I)             hira_B (O, R)
    Conv                 A (R, C k)  B (O, R)      hira_A (R, C, *k)         hira_B (O, R, *1)
    Embedding            A (R, I)    B (O, R)      hira_embedding_A (R, I)   hira_embedding_B (O, R)

HF PEFT 0.21.2 ignores its own rank_pattern, so ranks are read off the tensors, and patterns are not written there.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ..core.layers import ConvKind, EmbeddingKind
from ..core.method import Method
from ..core.site import Site
from ..core.targets import last_match
from ..methods.hira import HiRA
from .layout import PREFIX, Modules, Stored, Tensors
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes, exact_names

_ENDS = (".hira_A", ".hira_B", ".hira_embedding_A", ".hira_embedding_B")


class HiRATranslation(DeclaredTranslation):
    """HiRA on every kind of layer that HF PEFT has it for."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        hira = cast(HiRA, method)
        for site in sites:
            if last_match(hira.rank_pattern, site, hira.rank) != hira.rank:
                return f"{site.name}: HF PEFT gives every site of HIRA the same rank"
        return super().obstacle(modules, method, sites)

    def unlike(self, site: Site) -> str | None:
        if isinstance(site.kind, EmbeddingKind) and getattr(site.layer, "embed_scale", None) is not None:
            return f"{site.name}: HF PEFT leaves out the scale of this embedding"
        if isinstance(site.kind, ConvKind):
            layer = cast(nn.Conv2d, site.layer)
            if layer.groups > 1:
                return f"{site.name}: HF PEFT has no HIRA for grouped convolutions"
            if isinstance(layer, nn.Conv3d) and layer.kernel_size[:2] == (1, 1):
                return f"{site.name}: HF PEFT takes its kernel for that of a 1 x 1 Conv2d, and fails"
            if layer.padding_mode != "zeros":
                return f"{site.name}: HF PEFT pads with zeros whatever the convolution does"
        return None

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        found = []
        for site in sites:
            for name, keep in (("A", 1), ("B", 2)):
                key = self._key_of(site, name)
                if isinstance(site.kind, ConvKind):
                    tail = site.stored.shape[1:] if name == "A" else (1,) * (site.stored.ndim - 2)
                    found.append(Stored(key, ((site.name, name),), partial(_view, keep=keep, tail=tuple(tail)), _flat))
                else:
                    found.append(Stored(key, ((site.name, name),)))
        return found

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        ranks = {site.name: shapes[self._key_of(site, "A")][0] for site in found.sites}
        return Found({**found.settings, "rank_pattern": exact_names(ranks, found.settings["rank"])}, found.sites)

    def _key_of(self, site: Site, name: str) -> str:
        key = self.key(site, name)
        return f"{key.removesuffix(f'_{name}')}_embedding_{name}" if isinstance(site.kind, EmbeddingKind) else key

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        ends = {key: next((end for end in _ENDS if key.endswith(end)), None) for key in shapes}
        paths = dict.fromkeys(key.removeprefix(PREFIX).removesuffix(end) for key, end in ends.items() if end)
        return [modules.site(path) for path in paths if path in modules]


def _view(tensors: Sequence[Tensor], keep: int, tail: tuple[int, ...]) -> Tensor:
    return tensors[0].reshape(*tensors[0].shape[:keep], *tail)


def _flat(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.flatten(1),)
