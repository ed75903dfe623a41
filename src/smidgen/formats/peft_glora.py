"""GLoRA in Hugging Face PEFT's folder: the same tensors, and zeros for what is left out, where nothing is learned."""

from collections.abc import Sequence
from typing import cast

from ..core.method import Method
from ..core.site import Site
from ..methods.glora import GLoRA
from .layout import PREFIX, Stored, Tensors, clean, zeros
from .peft_declared import DeclaredTranslation


class GLoRATranslation(DeclaredTranslation):
    """A to E of linear layers."""

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        left_out = [
            zeros(f"{PREFIX}{clean(site.path)}.glora_{letter}.zeros", shape)
            for site in sites
            for letter, shape in _left_out(cast(GLoRA, method), site).items()
        ]
        return super().stored_peft(method, sites, tensors) + left_out


def _left_out(method: GLoRA, site: Site) -> dict[str, tuple[int, ...]]:
    """The letters that have no parameters at this site, with the shape that HF PEFT writes."""
    O, I, biased = site.fan_out, site.fan_in, site.bias is not None
    left: dict[str, tuple[int, ...]] = {"A": (O, I), "B": (O, I)} if method.A_B == "none" else {}
    if not biased or method.C == "none":
        left["C"] = (I, 1)
    return left if biased and method.D_E != "none" else {**left, "D": (O,), "E": (O,)}
