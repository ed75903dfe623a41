"""PVeRA: VeRA whose inner activation is drawn, not computed.  Fillioux et al. 2025, arXiv:2512.07703.

    y' = y + diag(b) B h            m, v = diag(d) A x          h = m + exp(v / 2) e while training, e ~ N(0, 1)
    W' = W + diag(b) B diag(d_m) A_m                            h = m once trained

A: (2R, I), whose first half gives m and second v   B: (O, R)   drawn once from `seed`, never trained, and the same for
all sites.   d: (2R,)   b: (O,)   b starts at zero, so training starts from the base model.
Trainable parameters: 2R + O per site.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.disk_names import DiskNames
from ..core.kernels import frozen_linear_scaled
from ..core.low_rank import LowRankAdapter
from ..core.method import method
from ..core.site import Site, compute_dtype
from .vera import Projections, VeRA


@method("pvera")
@dataclass(frozen=True, kw_only=True)
class PVeRA(VeRA):
    """VeRA's settings; while training h has noise of a learned size, from torch's own generator."""

    summary = "y' = y + diag(b) B h, h ~ N(m, exp v), m and v from diag(d) A x"
    paper = "Fillioux et al. 2025, arXiv:2512.07703"
    disk = DiskNames(
        "PVERA",
        fields={"rank": "r", "dropout": "pvera_dropout", "seed": "projection_prng_key"},
        tensors={
            "lambda_b": "pvera_lambda_b",
            "lambda_d": "pvera_lambda_d",
            "shared.A": "pvera_A",
            "shared.B": "pvera_B",
        },
        ignored=("generator_seed",),
    )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        return "a parameter read without a call has no activation to draw" if site.parameter else None

    def shared(self, sites: tuple[Site, ...]) -> Projections:
        return Projections(sites, 2 * self.rank, self.rank, self.seed, save=self.save_projection)

    def build(self, site: Site) -> "PVeRAAdapter":
        return PVeRAAdapter(self, site)


class PVeRAAdapter(LowRankAdapter):
    """d and b at one site."""

    shared: Projections

    def __init__(self, method: PVeRA, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        self.d_initial, self.rank = method.d_initial, method.rank
        self.O, self.I = site.fan_out, site.fan_in
        self.lambda_d = site.empty(2 * method.rank)
        self.lambda_b = site.empty(self.O)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.lambda_d, self.d_initial)
        nn.init.zeros_(self.lambda_b)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(call, x, *args, **kwargs)
        if self.dropout or not self.fuses(call):
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        A, B = self._projections()
        noise = torch.randn(x.numel() // x.shape[-1], self.rank, dtype=compute_dtype(x), device=x.device)
        W, b = self.site.stored, self.site.bias
        return frozen_linear_scaled(x, W, b, A, B, self.lambda_d, self.lambda_b, noise=noise)

    def delta(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().delta(x)
        if x.is_floating_point():  # an embedding's input is indices
            x = nn.functional.dropout(x, self.dropout)
        A, B = self._projections()
        m = self.site.project(x, self.lambda_d[: self.rank, None] * A[: self.rank])
        v = self.site.project(x, self.lambda_d[self.rank :, None] * A[self.rank :])
        h = m + torch.exp(0.5 * v) * torch.randn_like(m)
        return self.site.expand(h, self.lambda_b[:, None] * B)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._projections()
        return A[: self.rank], self.lambda_b[:, None] * (self.lambda_d[: self.rank] * B)

    def _projections(self) -> tuple[Tensor, Tensor]:
        """A (2R, I) and B (O, R) of this site."""
        device = self.lambda_d.device
        return self.shared.A[:, : self.I].to(device), self.shared.B[: self.O].to(device)
