"""TinyLoRA in Hugging Face PEFT's folder: as declared, in the order of the model, and embeddings the other way round.

Linear, Conv1D     A (R, I)   B (O, R)   P (u, R, R)      the same
Embedding          A (R, I)   B (O, R)   P (u, R, R)      tinylora_B (I, R)   tinylora_A (R, O)   tinylora_P transposed
"""

from collections.abc import Sequence

from torch import Tensor

from ..core.layers import EmbeddingKind
from ..core.method import Method
from ..core.site import Site
from .layout import Stored, Tensors
from .ordered import OrderedTranslation

_VECTOR = "shared.v."


class TinyLoRATranslation(OrderedTranslation):
    """TinyLoRA on every kind of layer that HF PEFT has it for."""

    def unlike(self, site: Site) -> str | None:
        scaled = isinstance(site.kind, EmbeddingKind) and getattr(site.layer, "embed_scale", None) is not None
        return f"{site.name}: HF PEFT leaves out the scale of this embedding" if scaled else None

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


def _turned(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].transpose(-1, -2).contiguous()
