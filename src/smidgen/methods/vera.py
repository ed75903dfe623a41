"""VeRA: learn how much of each row of two random matrices to add.  Kopiczko et al. 2023, arXiv:2310.11454, equation 2.

    W' = W + diag(b) B diag(d) A

A: (R, I)   B: (O, R)   drawn once from `seed`, never trained, and the same for all sites: each takes as many columns of
A and rows of B as it has inputs and outputs.   d: (R,)   b: (O,)   b starts at zero, so training starts from the base
model.   Trainable parameters: R + O per site.   Stacked experts share A and B, and have their own d and b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.kernels import frozen_linear_scaled
from ..core.large_rank import LargeRankAdapter, scaled
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.storage import master_dtype


@method("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Scales of shared random matrices.

    rank: R; far more than LoRA's, for a rank costs one parameter.   d_initial: where d starts.
    dropout: probability of dropping an entry of the adapter's input while training.   seed: of A and B.
    save_projection: write A and B as well; else whoever reads the folder draws them again from the seed.
    """

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = True

    summary = "W' = W + diag(b) B diag(d) A, A and B random and shared"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    disk = DiskNames(
        "VERA",
        fields={"rank": "r", "dropout": "vera_dropout", "seed": "projection_prng_key"},
        tensors={
            "lambda_b": "vera_lambda_b",
            "lambda_d": "vera_lambda_d",
            "shared.A": "vera_A",
            "shared.B": "vera_B",
        },
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_share(self, "dropout")

    def shared(self, sites: tuple[Site, ...]) -> "Projections":
        return Projections(sites, self.rank, self.rank, self.seed, save=self.save_projection)

    def build(self, site: Site) -> Adapter:
        return VeRAAdapter(self, site)


class Projections(Shared):
    """A (rows, largest I) and B (largest O, R), drawn from a seed on the CPU as Hugging Face PEFT draws them."""

    A: Tensor
    B: Tensor

    def __init__(self, sites: Sequence[Site], rows: int, rank: int, seed: int, *, save: bool) -> None:
        super().__init__()
        self.seed = seed
        like = sites[0].stored
        shapes = {"A": (rows, max(s.fan_in for s in sites)), "B": (max(s.fan_out for s in sites), rank)}
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=master_dtype(like), device=like.device)
            self.register_buffer(name, empty, persistent=save)

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.A = nn.init.kaiming_uniform_(torch.empty(self.A.shape), generator=generator).to(self.A)
        self.B = nn.init.kaiming_uniform_(torch.empty(self.B.shape), generator=generator).to(self.B)


class VeRAAdapter(LargeRankAdapter):
    """d and b at one site."""

    products = 2.0
    shared: Projections

    def __init__(self, method: VeRA, site: Site) -> None:
        super().__init__(site, rank=method.rank, dropout=method.dropout)
        self.d_initial, self.rank, self.stack = method.d_initial, method.rank, site.linear.stack
        self.O, self.I = site.fan_out, site.fan_in
        self.lambda_d = site.empty(self.stack * method.rank)
        self.lambda_b = site.empty(self.stack * self.O)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.lambda_d, self.d_initial)
        nn.init.zeros_(self.lambda_b)

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        return frozen_linear_scaled(x, W, b, *self._projections(), self.lambda_d, self.lambda_b, scale, mask)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._projections()
        # d stands at B as well: A then needs no gradient, a sixth of what training adds
        B = scaled(B, self.lambda_b.view(self.stack, -1, 1), self.lambda_d.view(self.stack, 1, -1))  # (E, O, R)
        return A if self.stack == 1 else A.repeat(self.stack, 1), B.flatten(0, 1)

    def _projections(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of this site."""
        device = self.lambda_d.device
        return self.shared.A[:, : self.I].to(device), self.shared.B[: self.O].to(device)
