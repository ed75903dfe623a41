"""BEFT: train only the biases of the value projections.  Huang et al. 2025, arXiv:2509.15974.

    v' = v + c          b' = b + c

c: (O,), starts at zero, so training starts from the base model.   O = number of output channels of the projection.
A projection without a bias gets one, and cannot be merged.   Trainable parameters: O per site.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.blocks import attentions, not_recognised
from ..core.disk_names import DiskNames
from ..core.layers import EmbeddingKind
from ..core.method import Method, method
from ..core.site import Site
from .bitfit import BitFitAdapter


@method("beft")
@dataclass(frozen=True, kw_only=True)
class BEFT(Method):
    """Train what is added to the values of each attention.  So few numbers want a learning rate of about 1e-2."""

    summary = "v' = v + c, of attention's values"
    paper = "Huang et al. 2025, arXiv:2509.15974"
    disk = DiskNames("BEFT", tensors={"change": "beft_bias"}, kinds=("linear",))

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "BEFT adds to what a call gives, not to a parameter"
        if site.kind is None or isinstance(site.kind, EmbeddingKind):
            return f"{type(site.layer).__name__} is no projection; BEFT acts on layers such as Linear"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        parts = attentions(model)
        paths = [part.value for part in parts if part.value]
        if not paths:
            raise not_recognised(model, "attention with a value projection", 'BEFT(targets=["*.v_proj"])')
        return paths, {part.path: "its values are computed without a call" for part in parts if not part.value}

    def build(self, site: Site) -> "BitFitAdapter":
        return (BEFTWithoutBias if site.bias is None else BitFitAdapter)(site)


class BEFTWithoutBias(BitFitAdapter):
    """c at a layer that has no bias to take it."""

    mergeable = False

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return Adapter.merged(self, W, b, rows)
