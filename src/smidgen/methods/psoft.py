"""PSOFT: turn the weight within its principal subspace.  Wu et al. 2025, arXiv:2505.11235, section 4.

    W' = W + B (diag(b) R diag(a) - I) A          W = U S V^T, its singular values sorted

A = the first K rows of V^T: (K, I)   B = the first K columns of U S: (O, K)   K = rank   a, b: (K,), which relax it
R = (I + Q)(I - Q)^-1: (K, K), orthogonal, of skew-symmetric Q; or its Neumann series, as in OFT.
Q starts at zero, a and b at 1, so training starts from the base model.   Trainable parameters: K (K - 1) / 2 + 2 K per
site; stacked experts each have their own.
A and B are computed from the base again when an adapter is loaded.  Singular vectors have no sign of their own: linear
algebra libraries that choose other signs make another adapter of the same file.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.checks import require_above_zero, require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import Method, method
from ..core.projected import ProjectedAdapter
from ..core.rotation import cayley, skew, upper_places
from ..core.site import Site


@method("psoft")
@dataclass(frozen=True, kw_only=True)
class PSOFT(Method):
    """Rotation of the principal subspace.

    rank: K, of the subspace.   dropout: on the input of what is added, while training.
    sharing: of the singular values: all in B, so that turns keep angles; or their roots in both ("pissa_init").
    svd: "full", or "lowrank": by `svd_iterations` power iterations on random directions from `seed`.
    orthogonal: False lets R be any matrix.   scale_input, scale_output: train a, b.
    cayley_neumann: the series in place of the inverse, of that many `terms`.   eps: norm(Q) stays below, there.
    """

    rank: int = 32
    dropout: float = 0.0
    sharing: Literal["psoft_init", "pissa_init"] = "psoft_init"
    svd: Literal["full", "lowrank"] = "full"
    svd_iterations: int = 10
    seed: int = 0
    orthogonal: bool = True
    scale_input: bool = True
    scale_output: bool = True
    cayley_neumann: bool = False
    terms: int = 5
    eps: float | None = None

    summary = "W' = W + B (R - I) A, R orthogonal, B A the top of W"
    paper = "Wu et al. 2025, arXiv:2505.11235"
    reads_weight = True
    disk = DiskNames(
        "PSOFT",
        fields={
            "rank": "r",
            "dropout": "psoft_dropout",
            "sharing": "ab_svd_init",
            "svd": "psoft_svd",
            "svd_iterations": "psoft_svd_lowrank_niter",
            "seed": "random_seed",
            "orthogonal": "psoft_orth",
            "scale_input": "psoft_mag_a",
            "scale_output": "psoft_mag_b",
            "cayley_neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
            "eps": "cayley_neumann_eps",
        },
        tensors={"R": "psoft_R.weight", "a": "psoft_R.vector_a", "b": "psoft_R.vector_b"},
        kinds=("linear",),
        ignored=("psoft_alpha",),  # B is divided by it, and then what B gives is multiplied by it
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_share(self, "dropout")
        require_one_of(self, "sharing", ("psoft_init", "pissa_init"))
        require_one_of(self, "svd", ("full", "lowrank"))
        require_above_zero(self, "eps")
        require(self.rank > 1 or self.free, "rank is 1; one dimension cannot be turned: scale it, or take more")
        require(not self.cayley_neumann or self.terms >= 4, f"terms is {self.terms}; the series takes at least 4")

    @property
    def free(self) -> bool:
        """True if more than a turn is trained."""
        return self.scale_input or self.scale_output or not self.orthogonal

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.rank > min(site.fan_in, site.fan_out):
            return f"rank {self.rank} is more than its {site.fan_out} x {site.fan_in} weight has"
        return None

    def build(self, site: Site) -> "PSOFTAdapter":
        return PSOFTAdapter(self, site)


class PSOFTAdapter(ProjectedAdapter):
    """R at one site: the numbers above Q's diagonal, or the matrix itself; a and b."""

    A: Tensor
    B: Tensor
    places: Tensor

    def __init__(self, method: PSOFT, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        self.method = method
        rank, E = method.rank, site.linear.stack
        experts = (E,) if E > 1 else ()
        self.R = site.empty(*experts, *((rank * (rank - 1) // 2,) if method.orthogonal else (rank, rank)))
        self.a = site.empty(*experts, rank) if method.scale_input else None
        self.b = site.empty(*experts, rank) if method.scale_output else None
        self.register_buffer("A", self.R.new_empty(E * rank, site.fan_in), persistent=False)
        self.register_buffer("B", self.R.new_empty(E * site.fan_out, rank), persistent=False)
        self.register_buffer("places", torch.empty(rank * (rank - 1) // 2, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        self.places = upper_places(self.method.rank).to(self.R.device)
        W = self.site.weight().to(self.R.dtype).reshape(self.site.linear.stack, self.site.fan_out, self.site.fan_in)
        U, S, Vh = self._svd(W)
        if self.method.sharing == "pissa_init":
            S = S.sqrt()
            Vh = S[..., None] * Vh
        self.A, self.B = Vh.flatten(0, 1).contiguous(), (U * S[..., None, :]).flatten(0, 1)

    def _svd(self, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U (E, O, R), S (E, R) and V^T (E, R, I), as HF PEFT computes them."""
        rank = self.method.rank
        if self.method.svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            return U[..., :rank], S[..., :rank], Vh[..., :rank, :]
        with torch.random.fork_rng(devices=[] if W.device.type == "cpu" else [W.device], device_type=W.device.type):
            torch.manual_seed(self.method.seed)
            U, S, V = torch.svd_lowrank(W, q=rank, niter=self.method.svd_iterations)
        return U, S, V.mT

    def reset(self, generator: torch.Generator | None) -> None:
        if self.method.orthogonal:
            nn.init.zeros_(self.R)
        else:
            with torch.no_grad():
                self.R.copy_(torch.eye(self.method.rank).expand_as(self.R))
        for vector in (self.a, self.b):
            if vector is not None:
                nn.init.ones_(vector)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, self._change()[0], self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        E, rank = self.site.linear.stack, self.method.rank
        with torch.autocast(self.R.device.type, enabled=False):  # small
            return self.A, torch.bmm(self.B.view(E, -1, rank), self._change()).flatten(0, 1)

    def _change(self) -> Tensor:
        """diag(b) R diag(a) - I (E, K, K)."""
        rank, E = self.method.rank, self.site.linear.stack
        eye = torch.eye(rank, dtype=self.R.dtype, device=self.R.device)
        R = eye + self._turn() if self.method.orthogonal else self.R.view(E, rank, rank)
        if self.b is not None:
            R = self.b.view(E, rank, 1) * R
        if self.a is not None:
            R = R * self.a.view(E, 1, rank)
        return R - eye

    def _turn(self) -> Tensor:
        """R - I (E, R, R), before it is scaled."""
        Q = skew(self.R.view(self.site.linear.stack, -1), self.places, self.method.rank)
        if not self.method.cayley_neumann:
            return cayley(Q)
        if self.method.eps is not None:
            Q = Q * (self.method.eps / torch.linalg.matrix_norm(Q, keepdim=True).clamp_min(self.method.eps))
        return cayley(Q, self.method.terms)
