"""LoRA-FA: LoRA with its first matrix frozen, so that no layer keeps its input.  Zhang et al. 2023, arXiv:2308.03303,
section 3.

    W' = W + s B A      A: (R, I), drawn once and not trained      B: (O, R), starts at zero      s = alpha / R

The gradient of A would need x (N, I); that of B needs x A^T (N, R) alone, and nothing else is kept for backward.
Trainable parameters: R O per site.

A's rows are drawn orthonormal.  The change of W nearest to the full gradient is then B's own gradient, but for a number
that Adam does not see; for another A it would have to be projected by (A A^T)^-1, as HF PEFT's optimiser does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.layers import LinearKind
from ..core.method import method
from ..core.projected import frozen_linear_projected
from ..core.site import Site
from .lora import LoRA, LoRAAdapter


@method("lora_fa")
@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA's settings, see there, but for `start`: A is drawn orthonormal."""

    summary = "W' = W + s B A, A frozen"
    paper = "Zhang et al. 2023, arXiv:2308.03303"
    known_starts = ("kaiming",)  # which is not looked at: it has a start of its own

    def build(self, site: Site) -> "LoRAFAAdapter":
        return LoRAFAAdapter(self, site)


class LoRAFAAdapter(LoRAAdapter):
    """B at one site, and A as it was drawn."""

    def __init__(self, method: LoRAFA, site: Site) -> None:
        super().__init__(method, site)
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)
        self.plain &= isinstance(site.kind, LinearKind)  # a convolution with W + D would keep x

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        for A in self.A.view(self.site.linear.stack, self.rank, -1):
            nn.init.orthogonal_(A, generator=generator)
        nn.init.zeros_(self.B)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        return frozen_linear_projected(x, W, b, self.A, None, self.B, scale, mask)
