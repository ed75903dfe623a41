"""C3A: add circular convolutions of blocks of the input.  Chen et al. 2024, arXiv:2407.19342, section 3.

    W' = W + D / I          D_mn[t, s] = w_mn[(s - t) mod B]          m, n: blocks of B outputs and of B inputs

w: (O / B, I / B, B), a row of each circulant block.   By the convolution theorem, with F the Fourier transform,
    D x = F^-1(sum_n conj(F(w_mn)) F(x_n)), of every block m of outputs
w starts at zero, so training starts from the base model (HF PEFT draws it, which does not).
Trainable parameters: O I / B per site.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter
from ..core.layers import EmbeddingKind, LinearKind
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match


@method("c3a")
@dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """Circulant blocks.

    block_size: B, a divisor of I and O; the larger, the fewer parameters.
    block_size_pattern: other sizes for the sites that a glob matches; the last one counts.
    """

    block_size: int = 256
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)

    summary = "W' = W + D / I, D circulant in blocks"
    paper = "Chen et al. 2024, arXiv:2407.19342"
    on_stacks = False
    disk = DiskNames("C3A", tensors={"w": "c3a_kernel"}, kinds=("linear",))

    def check(self) -> None:
        require_whole(self, "block_size")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if isinstance(site.kind, EmbeddingKind):
            return "words have no order, along which a convolution could run"
        size = self.block_size_at(site)
        if site.fan_in % size or site.fan_out % size:
            return f"its {site.fan_out} x {site.fan_in} weight does not divide into blocks of {size}"
        return None

    def block_size_at(self, site: Site) -> int:
        """B at this site."""
        return int(last_match(self.block_size_pattern, site, self.block_size))

    def build(self, site: Site) -> "C3AAdapter":
        return C3AAdapter(site, self.block_size_at(site))


class C3AAdapter(FullWeightAdapter):
    """w at one site."""

    in_blocks = False

    def __init__(self, site: Site, size: int) -> None:
        super().__init__(site)
        self.w = site.empty(site.fan_out // size, site.fan_in // size, size)
        self.thin = isinstance(site.kind, LinearKind)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.w)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.thin:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self.thin:
            return super().delta(x)
        m, n, B = self.w.shape
        rows = x.reshape(-1, n, B).to(self.w.dtype)  # transforms want 32 bits
        return _convolved(rows, self.w / (n * B)).reshape(*x.shape[:-1], m * B)

    def weight_delta(self, rows: slice) -> Tensor:
        m, n, B = self.w.shape
        place = torch.arange(B, device=self.w.device)
        circulant = self.w[:, :, (place[None] - place[:, None]) % B]  # (m, n, t, s)
        change: Tensor = circulant.transpose(1, 2).reshape(m * B, n * B)
        return change[rows] / (n * B)


def _convolved(x: Tensor, w: Tensor) -> Tensor:
    """x (N, n, B) by the circulant blocks w (m, n, B): (N, m, B)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
        return _product(x, w)
    result: Tensor = _Convolution.apply(x, w)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """The gradients are convolutions too; autograd would take them by transforms of twice the size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _product(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        B, dx, dw = x.shape[-1], None, None
        G = _frequencies(dy)  # (F, N, m)
        if ctx.needs_input_grad[0]:
            dx = _back(torch.bmm(G, _frequencies(w)), B)
        if ctx.needs_input_grad[1]:
            dw = _back(torch.bmm(G.mH, _frequencies(x)), B)
        return dx, dw


def _product(x: Tensor, w: Tensor) -> Tensor:
    return _back(torch.bmm(_frequencies(x), _frequencies(w).mH), x.shape[-1])


def _frequencies(x: Tensor) -> Tensor:
    """(rows, blocks, B) as (F, rows, blocks)."""
    transformed: Tensor = torch.fft.rfft(x)
    return transformed.permute(2, 0, 1)


def _back(y: Tensor, size: int) -> Tensor:
    """(F, rows, blocks) as (rows, blocks, B)."""
    transformed: Tensor = torch.fft.irfft(y.permute(1, 2, 0), n=size)
    return transformed
