"""TinyLoRA in Hugging Face PEFT's folder: as declared, in the order of the model, and embeddings the other way round.

Linear, Conv1D     A (R, I)   B (O, R)   P (u, R, R)      the same
Embedding          A (R, I)   B (O, R)   P (u, R, R)      tinylora_B (I, R)   tinylora_A (R, O)   tinylora_P transposed
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.errors import FolderError
from ..core.layers import EmbeddingKind
from ..core.method import Method
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .ordered import OrderedTranslation
from .translation import Found, Shapes

_VECTOR = "shared.v."


class TinyLoRATranslation(OrderedTranslation):
    """TinyLoRA on every kind of layer that HF PEFT has it for."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return next(filter(None, map(_unlike, sites)), None) or super().obstacle(modules, method, sites)

    def key(self, site: Site, name: str) -> str:
        if name.startswith(_VECTOR):
            return f"base_model.tinylora_v.{name.removeprefix(_VECTOR)}"
        if isinstance(site.kind, EmbeddingKind):
            name = {"A": "B", "B": "A"}.get(name, name)
        return super().key(site, name)

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        turned = {site.name for site in sites if isinstance(site.kind, EmbeddingKind)}
        return [
            Stored(one.key, one.holds, _turned, lambda tensor: (_turned([tensor]),))
            if one.holds[0][0] in turned and not one.holds[0][1].startswith(_VECTOR)
            else one
            for one in super().stored_peft(method, sites, tensors)
        ]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        if reasons := list(filter(None, map(_unlike, found.sites))):
            raise FolderError(f"cannot be followed: {'; '.join(reasons[:5])}")
        return found


def _unlike(site: Site) -> str | None:
    """Why HF PEFT computes something else at this site, or None."""
    scaled = isinstance(site.kind, EmbeddingKind) and getattr(site.layer, "embed_scale", None) is not None
    return f"{site.name}: HF PEFT leaves out the scale of this embedding" if scaled else None


def _turned(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].transpose(-1, -2).contiguous()
