"""DoRA: learn the direction of a weight by a low-rank change, and its magnitude apart.  Liu et al. 2024,
arXiv:2402.09353, equation 5; the norm gets no gradient, section 4.3.

    W' = diag(m / n) V          V = W + s B A          n = the norms of V's rows, held constant in backward

m: (O,)   A: (R, I)   B: (O, R)   s = alpha / R, or alpha / sqrt(R) rank-stabilised.
m starts at the norms of W's rows and B at zero, so training starts from the base model.
Trainable parameters: R (I + O) + O per site.

V is never formed to run:  n^2 = |W|^2 + 2 s (W A^T * B) 1 + s^2 (B A A^T * B) 1  and  y' = V x + (m / n - 1) V x + b.
Dropout follows the authors: the base's own part of (m / n - 1) V x reads the dropped input too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Call
from ..core.disk_names import DiskNames
from ..core.kernels import frozen_linear_stretched
from ..core.method import method
from ..core.site import Site
from .lora import LoRA, LoRAAdapter

_BLOCK = 256  # rows


@method("dora")
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA's settings; see there."""

    summary = "W' = m (W + s B A) / |W + s B A|, by rows"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    disk = DiskNames(
        "LORA",
        fields=LoRA.disk.fields,
        tensors={**LoRA.disk.tensors, "magnitude": "lora_magnitude_vector"},
        fixed={"use_dora": True},
    )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if not site.storage.readable:
            return f"its weight is held as {site.storage.name}; DoRA has to read it for the norms of its rows"
        return None

    def build(self, site: Site) -> "DoRAAdapter":
        return DoRAAdapter(self, site)


class DoRAAdapter(LoRAAdapter):
    """A, B and m at one site; on stacked experts m is (E O,)."""

    additive = False
    squares: Tensor  # |W|^2 (O,)

    def __init__(self, method: DoRA, site: Site) -> None:
        super().__init__(method, site)
        self.magnitude = site.empty(site.linear.stack * site.fan_out)
        self.register_buffer("squares", torch.empty_like(self.magnitude, requires_grad=False), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        # 16-bit rows are made fp32 on the way
        blocks = (some for W in self.site.weight_blocks() for some in torch.split(W, _BLOCK))
        norms = [torch.linalg.vector_norm(W, dim=1, dtype=self.squares.dtype) for W in blocks]
        self.squares = torch.cat(norms).square()
        self.of_version = _version(self.site.stored)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        self.magnitude.copy_(self.norms())

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        change, site = self.magnitude / self.norms() - 1, self.site  # (O,)
        if self.training and self.dropout and x.is_floating_point():
            dropped = self.dropped(x)
            A, B = self.factors()
            low = site.expand(site.project(dropped, A), B) * self.scale
            base = self.of_base(dropped)
            y: Tensor = call(x, *args, **kwargs) + low
            return torch.addcmul(y, low + base, site.channels(change, y))
        if self.fuses(call):
            return frozen_linear_stretched(x, site.stored, site.bias, *self.factors(), change, self.scale)
        y = super().forward(call, x, *args, **kwargs)  # V x + b
        change = site.channels(change, y)
        # a difference added to y: where m = n, y stays as it is to the last bit
        return (change * (y if site.bias is None else y - site.channels(site.bias, y))).add_(y)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """n (O,), without forming V where the layer itself runs."""
        if self.site.parameter is not None:  # which runs by `merged`
            return self._norms_of(self.site.weight().to(self.A.dtype) + self.weight_delta(slice(None)))
        if not torch.compiler.is_compiling() and self.of_version != _version(self.site.stored):
            self.prepare()  # the base has changed: another adapter was merged into it
        A, B = self.factors()
        s, device = self.scale, self.site.stored.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            of_A = torch.cat([torch.mm(W, A.to(W.dtype).T) for W in self.site.weight_blocks()])  # (O, R)
            both = (of_A * B).sum(1)
            change = (torch.mm(B, torch.mm(A, A.T)) * B).sum(1)
        smallest = torch.finfo(A.dtype).tiny  # a row of zeros stays one
        return (self.squares + 2 * s * both + s * s * change).clamp_min(smallest).sqrt()

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        change = self.weight_delta(rows).to(W.dtype)
        n = self._norms_of(self.site.weight(rows).to(W.dtype) + change.detach())
        by = self.magnitude[rows].to(W.dtype) / n
        if b is not None and self.site.bias is not None:  # what another adapter changed of it is scaled
            own = self.site.bias.detach().flatten()[rows].to(b.dtype)
            b = own + by * (b - own)
        return by[:, None] * (W + change), b

    @staticmethod
    def _norms_of(V: Tensor) -> Tensor:
        n: Tensor = torch.linalg.vector_norm(V, dim=1)
        return n.clamp_min(torch.finfo(n.dtype).tiny)


def _version(weight: Tensor) -> int:
    """Changes whenever the weight is written to."""
    return 0 if weight.is_inference() else weight._version
