"""TinyLoRA: steer a weight by a handful of numbers.  Morris et al. 2026, arXiv:2602.04118.

    W' = W + B (sum_k v_k P_k) A          A = S^1/2 V^T   B = U S^1/2   of W's R largest singular values

A: (R, I)   B: (O, R)   fixed.   P_k: (R, R), fixed, drawn from `seed` and the site's number.   v: (u,), one for each
group of sites.   v starts at zero, so training starts from the base model.   R = min(rank, O, I)
Trainable parameters: u for each group, of which there are sites * (1 - weight_tying), rounded, and at least one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import EmbeddingKind
from ..core.method import Method, Shared, method
from ..core.projected import ProjectedAdapter
from ..core.site import Site


@method("tinylora")
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Method):
    """A tiny vector through fixed random matrices, between the weight's own singular vectors.

    rank: R.   length: u.   weight_tying: 0 gives every site a vector of its own, 1 one to all; groups are neighbours.
    dropout: probability of dropping an entry of the adapter's input while training.   seed: of the P_k.
    save_projection: write the P_k as well; else whoever reads the folder draws them again from the seed.
    """

    rank: int = 2
    length: int = 64
    weight_tying: float = 0.0
    dropout: float = 0.0
    seed: int = 42
    save_projection: bool = True

    summary = "W' = W + B (sum_k v_k P_k) A, A and B of W's singular vectors"
    paper = "Morris et al. 2026, arXiv:2602.04118"
    reads_weight = True
    disk = DiskNames(
        "TINYLORA",
        fields={
            "rank": "r",
            "length": "u",
            "dropout": "tinylora_dropout",
            "seed": "projection_seed",
        },
        tensors={"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"},
        kinds=("linear", "conv1d-transposed", "embedding"),
        ignored=("init_v_bound",),
    )

    def check(self) -> None:
        require_whole(self, "rank", "length")
        require_share(self, "dropout")
        require(0 <= self.weight_tying <= 1, f"weight_tying is {self.weight_tying}; it is a share from 0 to 1")

    def shared(self, sites: tuple[Site, ...]) -> "Vectors":
        return Vectors(self, sites)

    def build(self, site: Site) -> "TinyLoRAAdapter":
        return TinyLoRAAdapter(self, site)


class Vectors(Shared):
    """One v (u,) for each group; numbers, groups: of each site by name, in the order of the sites."""

    def __init__(self, method: TinyLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        groups = max(1, round(len(sites) * (1 - method.weight_tying)))
        each = len(sites) // groups
        self.numbers = {site.name: number for number, site in enumerate(sites)}
        self.groups = {name: min(number // each, groups - 1) for name, number in self.numbers.items()}
        self.v = nn.ParameterList([sites[0].empty(method.length) for _ in range(groups)])

    def reset(self, generator: torch.Generator | None) -> None:
        for v in self.v:
            nn.init.zeros_(v)


class TinyLoRAAdapter(ProjectedAdapter):
    """A, B and the P_k at one site; stacked experts have A (E R, I) and B (E O, R), and share the P_k."""

    shared: Vectors
    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, method: TinyLoRA, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        self.stack, self.seed, self.group = site.linear.stack, method.seed, 0
        self.rank = min(method.rank, site.fan_out, site.fan_in)
        self.register_buffer("A", site.empty(self.stack * self.rank, site.fan_in).detach())
        self.register_buffer("B", site.empty(self.stack * site.fan_out, self.rank).detach())
        P = site.empty(method.length, self.rank, self.rank).detach()
        self.register_buffer("P", P, persistent=method.save_projection)

    def prepare(self) -> None:
        self.group = self.shared.groups[self.site.name]
        # HF PEFT's way of drawing them, so that its folders mean the same here
        generator = torch.Generator().manual_seed(self.seed + self.shared.numbers[self.site.name])
        P = torch.normal(0.0, self.rank**-0.5, self.P.shape, generator=generator)
        self.P = (P.transpose(1, 2) if isinstance(self.site.kind, EmbeddingKind) else P).contiguous().to(self.P)

    def reset(self, generator: torch.Generator | None) -> None:
        # here and not in `prepare`: it takes long, and a folder holds the outcome
        W = self.site.weight().to(self.A.dtype)
        U, S, Vh = torch.linalg.svd(W.view(self.stack, -1, W.shape[1]), full_matrices=False)
        root = S[:, : self.rank].sqrt()
        self.A = (root[:, :, None] * Vh[:, : self.rank]).flatten(0, 1).contiguous()
        self.B = (U[:, :, : self.rank] * root[:, None]).flatten(0, 1).contiguous()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        v = self.shared.v[self.group].to(self.P.device)
        return self.A, (v @ self.P.flatten(1)).view(self.rank, self.rank), self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        A, middle, B = self.parts()
        return A, B @ middle
