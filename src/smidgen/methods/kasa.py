"""KaSA: leave out a weight's smallest singular values and learn new ones.  Wang et al. 2024, arXiv:2412.06071,
equations 5-12.

    W' = W - N + s B diag(d) A          N = the R smallest terms of W's singular value decomposition U S V^T

d: (R,)   A: (R, I)   B: (O, R)   s = alpha / R.   B starts at zero, so training starts from W - N, the base model
without what the paper takes for noise; the base itself is not touched.   Trainable parameters: R (I + O + 1) per site.
While training, the penalty of equations 9-11 keeps d small and A and B near orthogonal:

    beta |d|^2 + gamma (|B^T B - 1| + |A A^T - 1|), of all sites
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, AdditiveAdapter, Call
from ..core.checks import require_above_zero
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.kernels import outside_autocast
from ..core.method import method
from ..core.products import linear, thin, times
from ..core.site import Site
from .lora import DRAWN, LoRA, LoRAAdapter


@method("kasa")
@dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
    """LoRA's settings, with its random starts.

    beta, gamma: how much the penalties count, on the size of d and on A and B not being orthogonal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    summary = "W' = W - N + s B diag(d) A, N of small singular values"
    paper = "Wang et al. 2024, arXiv:2412.06071"
    known_starts = DRAWN
    disk = DiskNames(
        "LORA",
        fields=LoRA.disk.fields,
        tensors={**LoRA.disk.tensors, "d": "lora_diag"},
        fixed={"kasa_config": ...},
    )

    def check(self) -> None:
        super().check()
        require_above_zero(self, "alpha")
        for name, value in (("beta", self.beta), ("gamma", self.gamma)):
            require(value >= 0, f"{name} is {value}; it is at least 0")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if not site.storage.readable:
            return f"its weight is held as {site.storage.name}; KaSA has to read it for its singular values"
        rank, smaller = self.rank_at(site), min(site.fan_in, site.fan_out)
        return None if rank < smaller else f"its weight has {smaller} singular values; KaSA leaves out {rank} of more"

    def build(self, site: Site) -> "KaSAAdapter":
        return KaSAAdapter(self, site)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        parts = [part for part in adapters.values() if isinstance(part, KaSAAdapter)]
        if not parts or not (self.beta or self.gamma):
            return None
        sizes = torch.stack([part.d.square().sum() for part in parts]).sum()
        return self.beta * sizes + self.gamma * torch.stack([part.skew() for part in parts]).sum()


class KaSAAdapter(LoRAAdapter):
    """d, A and B at one site.  On stacked experts every expert has its own: d is (E R,)."""

    starts_as_base = False
    noise_A: Tensor  # V^T of N (R, I)
    noise_B: Tensor  # -U S of N over s (O, R)

    def __init__(self, method: KaSA, site: Site) -> None:
        super().__init__(method, site)
        self._fuses = True  # a layer in few bits takes both as the factors that they are
        self.d = site.empty(self.A.shape[0])
        self.register_buffer("noise_A", torch.empty_like(self.A, requires_grad=False), persistent=False)
        self.register_buffer("noise_B", torch.empty_like(self.B, requires_grad=False), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        super().prepare()
        R, stack = self.rank, self.site.linear.stack
        W = self.site.weight().to(self.A.dtype)
        U, S, Vh = torch.linalg.svd(W.reshape(stack, -1, W.shape[1]), full_matrices=False)
        self.noise_A = Vh[:, -R:].flatten(0, 1).contiguous()
        self.noise_B = (U[..., -R:] * (S[:, None, -R:] / -self.scale)).flatten(0, 1)

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        nn.init.normal_(self.d, generator=generator)

    def learned(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B diag(d) (O, R)."""
        stack = self.site.linear.stack
        if stack == 1:
            return self.A, self.B * self.d
        return self.A, (self.B.view(stack, -1, self.rank) * self.d.view(stack, 1, -1)).flatten(0, 1)

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        # without dropout: `forward`
        return linear_beside_noise(x, W, b, self.A, self.B, self.d, self.noise_A, self.noise_B, scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.learned()
        E, I = self.site.linear.stack, A.shape[1]
        both = torch.cat([A.view(E, -1, I), self.noise_A.view(E, -1, I)], 1)  # (E, 2 R, I)
        return both.flatten(0, 1), torch.cat([B, self.noise_B], 1)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.dropout:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return super().delta(x)
        site, (A, B) = self.site, self.learned()  # dropout is of what is learned; N is left out of all of x
        left_out = site.expand(site.project(x, self.noise_A), self.noise_B)
        return self.scale * (site.expand(site.project(self.dropped(x), A), B) + left_out)

    def skew(self) -> Tensor:
        """|B^T B - 1| + |A A^T - 1|, Frobenius norms."""
        stack = self.site.linear.stack
        A, B = self.A.view(stack, self.rank, -1), self.B.view(stack, -1, self.rank)
        one = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        norms = torch.linalg.matrix_norm(B.mT @ B - one) + torch.linalg.matrix_norm(A @ A.mT - one)
        return cast(Tensor, norms).sum()


class _LinearBesideNoise(torch.autograd.Function):
    """`frozen_linear_low_rank` with [A; A0] and [B diag(d), B0], of which A0 and B0 get no gradient.   Kept: x, x A^T.

    g  = s dy [B diag(d), B0]         (N, 2 R)
    dA = g_B^T x                      (R, I)         g_B: the first R columns of g
    P  = s dy^T (x A^T)               (O, R)         dB = P diag(d)     dd = sum_o B * P
    dx = dy W + g [A; A0]             (N, I)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        A0: Tensor,
        B0: Tensor,
        scale: float,
    ) -> Tensor:
        y = linear(x, W, b)
        both_A, both_B = _both(A, B, d, A0, B0, x.dtype)
        h = thin(x.reshape(-1, x.shape[-1]), both_A)  # (N, 2 R)
        y.view(-1, y.shape[-1]).addmm_(h, both_B.T, alpha=scale)
        ctx.save_for_backward(x, W, A, B, d, A0, B0, h[:, : len(A)].clone())
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, d, A0, B0, h = ctx.saved_tensors
        rows, dy_rows, R = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), len(A)
        if torch.is_grad_enabled():  # this backward is itself differentiated; h was outside any graph
            h = thin(rows, A.to(x.dtype))
        both_A, both_B = _both(A, B, d, A0, B0, x.dtype)
        g = thin(dy_rows, both_B.T).mul_(ctx.scale)
        dA = torch.mm(g[:, :R].T, rows).to(A.dtype)
        P = torch.mm(h.T, dy_rows).mul_(ctx.scale).T.to(B.dtype)
        dx = times(dy_rows, W).addmm_(g, both_A).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, P * d, (B * P).sum(0), None, None, None


def _both(A: Tensor, B: Tensor, d: Tensor, A0: Tensor, B0: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[A; A0] (2 R, I) and [B diag(d), B0] (O, 2 R)."""
    return torch.cat([A, A0]).to(dtype), torch.cat([B * d, B0], 1).to(dtype)


def linear_beside_noise(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    A0: Tensor,
    B0: Tensor,
    scale: float,
) -> Tensor:
    """x W^T + b + scale x (B diag(d) A + B0 A0)^T, with gradients for x, A, B and d only.

    x: (..., I)   W: (O, I)   A, A0: (R, I)   B, B0: (O, R)   d: (R,)   Under autocast all runs in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        return outside_autocast(linear_beside_noise, x, W, b, A, B, d, A0, B0, scale)
    result: Tensor = _LinearBesideNoise.apply(x, W, b, A, B, d, A0, B0, scale)  # type: ignore[no-untyped-call]
    return result
