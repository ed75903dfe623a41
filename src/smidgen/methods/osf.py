"""OSF: train a weight's lesser singular directions, keep the greater.  Nayak et al. 2025, arXiv:2504.07097, section 3.

    W = U0 S0 V0 + H          H: the first K of W's singular values, which are kept
    W' = U S V + H  =  W + (U S) (V - V0) + (U S - U0 S0) V0

U: (O, M)   S: (M,)   V: (M, I)   M = min(O, I) - K.   The second form is the same number as the first, needs neither H
nor another base, and is W itself where U, S, V are what they start as, U0, S0, V0: so training starts from the base
model bit for bit, and taking the adapter off gives it back.
Gradients of U and V are projected onto what is orthogonal to H's singular vectors; an optimiser that scales each entry,
as Adam does, leaves that space a little.   Trainable parameters: M (O + I + 1) per site, half of the weight and more.
U0, S0, V0 are computed from the base again when an adapter is loaded, so it belongs to this base alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import Gradients, Pullback
from ..core.large_rank import LargeRankAdapter
from ..core.method import Method, method
from ..core.products import linear
from ..core.site import Site
from ..core.targets import last_match


@method("osf")
@dataclass(frozen=True, kw_only=True)
class OSF(Method):
    """The lesser singular directions.

    effective_rank: K; a fraction up to 1.0 is a share of min(O, I).
    effective_rank_pattern: other numbers for the sites that a glob matches; the last one counts.
    """

    effective_rank: int | float = 0.5
    effective_rank_pattern: Mapping[str, int | float] = field(default_factory=dict)

    summary = "W' = W - U0 S0 V0 + U S V, the lesser singular directions"
    paper = "Nayak et al. 2025, arXiv:2504.07097"
    reads_weight, on_stacks = True, False
    disk = DiskNames(
        "OSF",
        fields={"effective_rank_pattern": "rank_pattern"},
        tensors={"U": "osf_svd_params.U_low", "S": "osf_svd_params.S_low", "V": "osf_svd_params.V_low"},
        kinds=("linear",),
        ignored=("target_svd_config",),  # which HF PEFT ignores too
    )

    def check(self) -> None:
        for rank in (self.effective_rank, *self.effective_rank_pattern.values()):
            is_share = isinstance(rank, float) and 0 < rank <= 1
            require(
                is_share or (rank > 0 and rank == int(rank)),
                f"effective_rank is {rank}; it is how many singular values are kept, or their share as a fraction",
            )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        kept, least = self.kept_at(site), min(site.fan_in, site.fan_out)
        if not 0 < kept < least:
            return f"{kept} of its {least} singular values would be kept; it takes some to keep and some to train"
        return None

    def kept_at(self, site: Site) -> int:
        """K at this site."""
        rank, least = last_match(self.effective_rank_pattern, site, self.effective_rank), min(site.fan_in, site.fan_out)
        return int(least * rank) if isinstance(rank, float) and rank <= 1 else min(int(rank), least)

    def build(self, site: Site) -> "OSFAdapter":
        return OSFAdapter(site, self.kept_at(site))


class OSFAdapter(LargeRankAdapter):
    """U, S and V at one site."""

    U0: Tensor
    S0: Tensor
    V0: Tensor
    kept_U: Tensor
    kept_S: Tensor
    kept_V: Tensor

    def __init__(self, site: Site, kept: int) -> None:
        O, I = site.fan_out, site.fan_in
        trained = min(O, I) - kept
        super().__init__(site, rank=2 * trained)
        self.kept = kept
        self.U, self.S, self.V = site.empty(O, trained), site.empty(trained), site.empty(trained, I)
        for name, parameter in (("U0", self.U), ("S0", self.S), ("V0", self.V)):
            self.register_buffer(name, torch.empty_like(parameter, requires_grad=False), persistent=False)
        for name, shape in (("kept_U", (O, kept)), ("kept_S", (kept,)), ("kept_V", (kept, I))):
            self.register_buffer(name, self.S0.new_empty(shape), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        U, S, V = torch.linalg.svd(self.site.weight().to(self.U.dtype), full_matrices=False)
        K = self.kept
        self.kept_U, self.kept_S, self.kept_V = U[:, :K].contiguous(), S[:K].clone(), V[:K].contiguous()
        self.U0, self.S0, self.V0 = U[:, K:].contiguous(), S[K:].clone(), V[K:].contiguous()

    def reset(self, generator: torch.Generator | None) -> None:
        with torch.no_grad():
            for parameter, start in ((self.U, self.U0), (self.S, self.S0), (self.V, self.V0)):
                parameter.copy_(start)

    @property
    def by_factors(self) -> bool:
        return False  # R is near the layer's size: a copy for each row of a mixed batch would be large

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V = _projecting(self.U, self.kept_U), _projecting(self.V.T, self.kept_V.T).T
        return _factors(U * self.S, V, self)

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        is_wide = x.dtype == W.dtype == self.U.dtype and not torch.is_autocast_enabled(x.device.type)
        if not is_wide or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().fused(x, W, b, scale, mask)
        result: Tensor = _FrozenLinear.apply(x, W, b, self.U, self.S, self.V, self)  # type: ignore[no-untyped-call]
        return result

    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        L, V = (self.U * self.S).detach(), self.V.detach()
        A, B = _factors(L, V, self)
        W = B[rows] @ A if W is None else torch.addmm(W, B[rows], A)

        def back(dW: Tensor, gradients: Gradients) -> None:
            dU, dS, dV = self.gradients(torch.mm(dW, V.T), torch.mm(L.T, dW))
            for parameter, gradient in ((self.U, dU), (self.S, dS), (self.V, dV)):
                if parameter.requires_grad:
                    gradients[parameter].add_(gradient)

        return W, back

    def gradients(self, dL: Tensor, dV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of U, S and V, those of L = U S (O, M) and of V (M, I), which is written to; projected."""
        dS = (dL * self.U).sum(0)
        dU = torch.addmm(dL, self.kept_U, self.kept_U.T @ dL, alpha=-1).mul_(self.S)
        return dU, dS, dV.addmm_(dV @ self.kept_V.T, self.kept_V, alpha=-1)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b + (x (V - V0)^T) L^T + (x V0^T) (L - L0)^T, L = U S.   Kept: x, and x V^T (N, M).

    W + L V - L0 V0 is Uk Sk Vk + L V, of which less is multiplied, where no rounding has to vanish at the start:
        p  = dy Uk (N, K)         g  = dy L     (N, M)           dx = (p Sk) Vk + g V     (N, I)
        dL = dy^T (x V^T)         dV = g^T x
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, S: Tensor, V: Tensor, part: OSFAdapter
    ) -> Tensor:
        A, B = _factors(U * S, V, part)
        rows, y = x.reshape(-1, x.shape[-1]), linear(x, W, b)
        h = torch.mm(rows, A.T)
        y.view(-1, y.shape[-1]).addmm_(h, B.T)
        of_change, of_start = h.chunk(2, dim=1)
        ctx.save_for_backward(x, U, S, V, of_change + of_start)
        ctx.part = part
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, U, S, V, h = ctx.saved_tensors
        part: OSFAdapter = ctx.part
        rows, dy_rows, dx = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), None
        g = torch.mm(dy_rows, U * S)
        if ctx.needs_input_grad[0]:
            p = torch.mm(dy_rows, part.kept_U).mul_(part.kept_S)
            dx = torch.mm(p, part.kept_V).addmm_(g, V).view(x.shape)
        dU, dS, dV = part.gradients(torch.mm(h.T, dy_rows).T, torch.mm(g.T, rows))
        return dx, None, None, dU, dS, dV, None


def _factors(L: Tensor, V: Tensor, part: OSFAdapter) -> tuple[Tensor, Tensor]:
    """A (2M, I) and B (O, 2M) of L V - L0 V0, so taken apart that one of each pair vanishes at the start."""
    return torch.cat((V - part.V0, part.V0)), torch.cat((L, L - part.U0 * part.S0), dim=1)


class _Projecting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return torch.addmm(d, kept, kept.T @ d, alpha=-1), None


def _projecting(matrix: Tensor, kept: Tensor) -> Tensor:
    """The matrix (n, M), whose gradient loses what lies in the directions that are kept, (n, K)."""
    if not torch.is_grad_enabled():
        return matrix
    if torch.compiler.is_compiling():
        along = kept @ (kept.T @ matrix)
        return matrix + (along.detach() - along)  # zero, but not its gradient
    result: Tensor = _Projecting.apply(matrix, kept)  # type: ignore[no-untyped-call]
    return result
