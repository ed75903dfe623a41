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

import torch
from torch import Tensor

from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
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


class OSFAdapter(LowRankAdapter):
    """U, S and V at one site."""

    U0: Tensor
    S0: Tensor
    V0: Tensor
    kept_U: Tensor
    kept_V: Tensor

    def __init__(self, site: Site, kept: int) -> None:
        super().__init__(site)
        O, I = site.fan_out, site.fan_in
        trained = min(O, I) - kept
        self.kept = kept
        self.U, self.S, self.V = site.empty(O, trained), site.empty(trained), site.empty(trained, I)
        for name, parameter in (("U0", self.U), ("S0", self.S), ("V0", self.V)):
            self.register_buffer(name, torch.empty_like(parameter, requires_grad=False), persistent=False)
        self.register_buffer("kept_U", self.U0.new_empty(O, kept), persistent=False)
        self.register_buffer("kept_V", self.V0.new_empty(kept, I), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        U, S, V = torch.linalg.svd(self.site.weight().to(self.U.dtype), full_matrices=False)
        K = self.kept
        self.kept_U, self.kept_V = U[:, :K].contiguous(), V[:K].contiguous()
        self.U0, self.S0, self.V0 = U[:, K:].contiguous(), S[K:].contiguous(), V[K:].contiguous()

    def reset(self, generator: torch.Generator | None) -> None:
        with torch.no_grad():
            for parameter, start in ((self.U, self.U0), (self.S, self.S0), (self.V, self.V0)):
                parameter.copy_(start)

    @property
    def by_factors(self) -> bool:
        return False  # R is near the layer's size: a copy for each row of a mixed batch would be large

    def factors(self) -> tuple[Tensor, Tensor]:
        U, V = _projecting(self.U, self.kept_U), _projecting(self.V.T, self.kept_V.T).T
        left = U * self.S  # (O, M)
        return torch.cat((V - self.V0, self.V0)), torch.cat((left, left - self.U0 * self.S0), dim=1)


def _projecting(matrix: Tensor, kept: Tensor) -> Tensor:
    """The matrix (n, M), whose gradient loses what lies in the directions that are kept, (n, K)."""
    if not torch.is_grad_enabled():
        return matrix
    along = kept @ (kept.T @ matrix)
    return matrix + (along.detach() - along)  # zero, but not its gradient
