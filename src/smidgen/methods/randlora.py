"""RandLoRA: a full-rank change, as a sum of scaled random products.  Albert et al. 2025, arXiv:2502.00987.

    W' = W + s sum_j B_j diag(l_j) A diag(g_j)          s = alpha / R          (the transpose of the sum where I > O)

A: (R, m)   B_j: (M, R)   drawn once from `seed`, never trained, and the same for all sites.   m, M: the smaller and the
larger of I and O.   l_j: (R,)   g_j: (m,)   j = 1 .. n, n = m / R rounded up, so that the change has full rank.
l starts at zero, so training starts from the base model.   Trainable parameters: n (R + m) per site.

The sum is one product of two matrices, C (M, R n), of the B_j's columns, and F (R n, m), of the rows
l_j[k] A[k] * g_j.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_finite, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.large_rank import LargeRankAdapter, scaled
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.storage import master_dtype


@method("randlora")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    """Scales of shared random matrices, as many as make the change full-rank.

    rank: R; a smaller one means more bases, and more parameters.   alpha: the change is scaled by alpha / R.
    dropout: probability of dropping an entry of the adapter's input while training.   seed: of A and B.
    sparse: entries of A and B are 1 or -1 with a probability of 1/6 each, else 0; very_sparse: of 1 / (2 sqrt(m)).
    save_projection: write A and B as well; else whoever reads the folder draws them again from the seed.
    """

    rank: int = 32
    alpha: float = 640.0
    dropout: float = 0.0
    seed: int = 0
    sparse: bool = False
    very_sparse: bool = False
    save_projection: bool = True

    summary = "W' = W + s sum_j B_j diag(l_j) A diag(g_j), A and B random and shared"
    paper = "Albert et al. 2025, arXiv:2502.00987"
    disk = DiskNames(
        "RANDLORA",
        fields={
            "rank": "r",
            "alpha": "randlora_alpha",
            "dropout": "randlora_dropout",
            "seed": "projection_prng_key",
        },
        tensors={
            "gains": "randlora_gamma",
            "scales": "randlora_lambda",
            "shared.A": "randlora_A",
            "shared.B": "randlora_B",
        },
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_finite(self, "alpha")
        require_share(self, "dropout")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        return "RandLoRA's bases make up one matrix, not a stack of them" if site.linear.stack > 1 else None

    def shared(self, sites: tuple[Site, ...]) -> "Bases":
        return Bases(self, sites)

    def build(self, site: Site) -> "RandLoRAAdapter":
        return RandLoRAAdapter(self, site)


class Bases(Shared):
    """A (R, 1, largest m) and B (largest M, largest n, R), drawn on the CPU as Hugging Face PEFT draws them."""

    A: Tensor
    B: Tensor

    def __init__(self, method: RandLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        self.method = method
        small, large = sorted((max(s.fan_in for s in sites), max(s.fan_out for s in sites)))
        like, R = sites[0].stored, method.rank
        for name, shape in {"A": (R, 1, small), "B": (large, math.ceil(small / R), R)}.items():
            empty = torch.empty(shape, dtype=master_dtype(like), device=like.device)
            self.register_buffer(name, empty, persistent=method.save_projection)

    def prepare(self) -> None:
        generator, small = torch.Generator().manual_seed(self.method.seed), self.A.shape[-1]
        if self.method.sparse or self.method.very_sparse:
            share = 0.5 / (math.sqrt(small) if self.method.very_sparse else 3)  # of entries that are 1, and that are -1
            A, B = (torch.rand(M.shape, generator=generator) for M in (self.A, self.B))
            A, B = (M.gt(1 - share).float() - M.lt(share).float() for M in (A, B))
        else:
            A = _drawn(self.A.shape, generator)
            M, n, R = self.B.shape
            B = torch.cat([_drawn((M, 1, R), generator) for _ in range(n)], dim=1)
        self.A, self.B = (A / A.std()).to(self.A), (B / B.std()).to(self.B)


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # bf16, and divided by its deviation in bf16: as HF PEFT has it
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


class RandLoRAAdapter(LargeRankAdapter):
    """l (R, n) and g (n, m) at one site."""

    shared: Bases

    def __init__(self, method: RandLoRA, site: Site) -> None:
        self.m, self.M = sorted((site.fan_in, site.fan_out))
        bases = math.ceil(self.m / method.rank)
        super().__init__(site, rank=method.rank * bases, scale=method.alpha / method.rank, dropout=method.dropout)
        self.transposed = site.fan_in > site.fan_out
        self.scales = site.empty(method.rank, bases)
        self.gains = site.empty(bases, self.m)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.scales)
        nn.init.constant_(self.gains, 1 / max(self.gains.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        R, n = self.scales.shape
        A, B = self.shared.A[:, :, : self.m].to(self.scales.device), self.shared.B.to(self.scales.device)
        F = scaled(A, self.scales[:, :, None], self.gains).flatten(0, 1)  # (R n, m)
        C = B.flatten(1)[: self.M, : R * n]
        return (C.T, F.T) if self.transposed else (F, C)
