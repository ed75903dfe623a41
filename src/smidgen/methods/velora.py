"""VeLoRA: a LoRA that keeps a compressed input for its backward.  Miles et al. 2024, arXiv:2405.17991, section 3.

    W' = W + s B A                          forward as LoRA's
    dA = g^T X',   X' = c (X v) v^T         X v: one number for each group of D neighbours of x, all that is kept of it

A: (R, I)   B: (O, R)   s = alpha / R   v: (D,) of length 1, the same for all groups   D = I / groups, rounded up
g: the gradient of x A^T   c: gradient_scale.   The gradient of x itself is exact.
B starts at zero, so training starts from the base model.   Trainable parameters: R (I + O) per site.
Kept for backward: groups + R numbers per token, where LoRA keeps I + R.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_above_zero, require_one_of, require_whole
from ..core.disk_names import DiskNames
from ..core.method import method
from ..core.site import Site, compute_dtype
from .lora import LoRA, LoRAAdapter

Projection = Literal["batch_average", "batch_average_once", "random"]


@method("velora")
@dataclass(frozen=True, kw_only=True)
class VeLoRA(LoRA):
    """LoRA's settings; see there.

    groups: into how many parts each input is cut; more are more exact and keep more.
    projection: v is the average part of the batch, anew in every step or that of the first batch alone, or drawn once.
    gradient_scale: c.
    """

    groups: int = 64
    projection: Projection = "batch_average"
    gradient_scale: float = 1.0

    summary = "W' = W + s B A, x kept compressed for backward"
    paper = "Miles et al. 2024, arXiv:2405.17991"
    on_linear_calls = True
    disk = DiskNames(
        "LORA",
        fields=LoRA.disk.fields,
        tensors={**LoRA.disk.tensors, "v": "lora_velora_embed"},
        fixed={"velora_config": ...},
    )

    def check(self) -> None:
        super().check()
        require_whole(self, "groups")
        require_one_of(self, "projection", get_args(Projection))
        require_above_zero(self, "gradient_scale")

    def build(self, site: Site) -> "VeLoRAAdapter":
        return VeLoRAAdapter(self, site)


class VeLoRAAdapter(LoRAAdapter):
    """A, B and v at one site.  v is zero until the first batch, unless it is drawn."""

    v: Tensor

    def __init__(self, method: VeLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.groups, self.projection, self.gradient_scale = method.groups, method.projection, method.gradient_scale
        self.register_buffer("v", site.empty(-(-site.fan_in // self.groups)).detach())

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        self.v.zero_()
        if self.projection == "random":
            self.v.copy_(_of_length_1(self.v.normal_(generator=generator)))

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().delta(x)
        A, B = self.factors()
        x = self.dropped(x).to(compute_dtype(x))
        parts = self._parts(x.detach())
        if self.projection != "random":
            fresh = _of_length_1(parts.flatten(0, 1).mean(0, dtype=self.v.dtype))
            keeps = self.v.any() if self.projection == "batch_average_once" else torch.zeros_like(fresh[0]).bool()
            self.v.copy_(torch.where(keeps, self.v, fresh))
        v = self.v.to(x.dtype)
        h = _Compressed.apply(x, A.to(x.dtype), parts @ v, v, self.gradient_scale)  # type: ignore[no-untyped-call]
        return self.site.expand(h, B) * self.scale

    def _parts(self, x: Tensor) -> Tensor:
        """x (..., I) cut into (N, groups, D), zeros at its end if that does not come out."""
        rows, D = x.reshape(-1, x.shape[-1]), len(self.v)
        return F.pad(rows, (0, self.groups * D - rows.shape[1])).view(len(rows), self.groups, D)


class _Compressed(torch.autograd.Function):
    """x A^T, for whose backward x is kept as compressed (N, groups)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, compressed: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(A, compressed, v.clone())
        ctx.scale = scale
        return F.linear(x, A)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        A, compressed, v = ctx.saved_tensors
        per_group = torch.mm(g.reshape(-1, g.shape[-1]).T, compressed)  # (R, groups); X' itself is not made
        dA = (ctx.scale * per_group[..., None] * v).flatten(1)[:, : A.shape[1]]
        return torch.matmul(g, A) if ctx.needs_input_grad[0] else None, dA, None, None, None


def _of_length_1(v: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(v)
    return torch.where(length > 0, v / length, len(v) ** -0.5)
