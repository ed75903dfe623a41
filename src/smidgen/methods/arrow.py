"""Arrow: route every token to the LoRA experts that it points along, without training.  Ostapenko et al. 2024,
arXiv:2405.11157, section 4.2; GenKnowSub, Bagherifard et al. 2025, ACL short papers 54: what is general is taken out.

    y' = W x + b + sum_k c_k B_k A_k x          c = softmax(|P x| / t) over the top_k largest, 0 elsewhere
    P_k = the first right singular vector of B_k A_k
    A_k, B_k less the mean A and the mean B of the `general` experts, if there are any

A_k: (R, I)   B_k: (O, R)   P: (K, I)   K experts; their own alpha / rank is part of B_k.   t: temperature.
No trainable parameters; K R (I + O) per site with `train_experts`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter
from ..core.checks import require_above_zero, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.experts import ExpertsAdapter, expert_at, live_in, sites_of
from ..core.layers import EmbeddingKind, LinearKind
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Targets


@method("arrow")
@dataclass(frozen=True, kw_only=True)
class Arrow(Method):
    """A mixture of LoRA adapters that live in the model: load them, then add this one, which copies them.

    experts: their names.   general: names of those that learned what all tasks need, such as plain text; their mean is
        subtracted from every expert.   top_k: how many experts a token is routed to.   temperature: lower is sharper.
    rank: R; that of the experts where they live in the model.
    train_experts: train the copies; where none of that name lives in the model they are fresh.
    """

    experts: tuple[str, ...] = ("0", "1", "2")
    general: tuple[str, ...] = ()
    top_k: int = 3
    temperature: float = 1.0
    rank: int = 8
    train_experts: bool = False

    summary = "y' = W x + sum_k c_k B_k A_k x, c by where x points"
    paper = "Ostapenko et al. 2024, arXiv:2405.11157"
    disk = DiskNames("LORA", fixed={"arrow_config": ...})

    def __post_init__(self) -> None:
        for name in ("experts", "general"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()

    def check(self) -> None:
        names, K = (*self.experts, *self.general), len(self.experts)
        require(K > 0 and len(set(names)) == len(names), f"experts are {', '.join(names)}; name each of them once")
        require(1 <= self.top_k <= K, f"top_k is {self.top_k}; it is 1 to {K}, the number of experts")
        require_whole(self, "rank")
        require_above_zero(self, "temperature")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None or not isinstance(site.kind, LinearKind | EmbeddingKind):
            return f"Arrow routes tokens, and {type(site.layer).__name__} is no layer that is called on tokens"
        return None

    def fitted(self, model: nn.Module) -> "Arrow":
        names = (*self.experts, *self.general)
        if not live_in(model, names, "Arrow", or_fresh=self.train_experts):
            return self
        sites = sites_of(model, self.experts)
        ranks = {len(e.factors()[0]) for site in sites_of(model, names) for n in names if (e := expert_at(site, n))}
        require(
            len(ranks) == 1 or not self.general,
            f"the ranks are {sorted(ranks)}; what is general can be subtracted from experts of one rank only",
        )
        targets = Targets.exactly(site.path for site in sites) if self.targets.is_auto else self.targets
        return replace(self, targets=targets, rank=max(ranks))

    def build(self, site: Site) -> "ArrowAdapter":
        return ArrowAdapter(self, site)


class ArrowAdapter(ExpertsAdapter, AdditiveAdapter):
    """The experts of one layer, and P (K, I) where they are not trained."""

    P: Tensor

    def __init__(self, method: Arrow, site: Site) -> None:
        super().__init__(site, method.experts, method.rank, trained=method.train_experts)
        self.method = method
        if not method.train_experts:
            self.register_buffer("P", site.empty(len(method.experts), site.fan_in).detach())

    def prepare(self) -> None:
        super().prepare()
        if self.is_taken and not self.method.train_experts:
            self.P.copy_(self.directions())

    def expert(self, name: str) -> tuple[Tensor, Tensor, float]:
        A, B, scale = super().expert(name)
        for general in self.method.general:
            A_general, B_general, _ = super().expert(general)
            A, B = A - A_general / len(self.method.general), B - B_general / len(self.method.general)
        return A, B, scale

    @torch.no_grad()
    def directions(self) -> Tensor:
        """P (K, I), without forming B_k A_k; zero for an expert that changes nothing."""
        K = len(self.method.experts)
        A, B = self.A.view(K, -1, self.A.shape[1]), self.B.view(self.B.shape[0], K, -1).transpose(0, 1)
        of_A, of_B = torch.linalg.qr(A.mT), torch.linalg.qr(B)
        _, S, Vh = torch.linalg.svd(of_B.R @ of_A.R.mT, full_matrices=False)  # of B A = Q_B (R_B R_A^T) Q_A^T
        P = torch.matmul(of_A.Q, Vh[:, 0, :, None])[..., 0]
        return torch.where(S[:, :1] > 0, P, 0)

    def delta(self, x: Tensor) -> Tensor:
        method = self.method
        P = self.directions() if method.train_experts else self.P
        along = self.site.project(x, P).abs() / method.temperature  # (..., K)
        kept = along.topk(method.top_k, dim=-1)
        c = torch.zeros_like(along).scatter(-1, kept.indices, kept.values.softmax(-1).to(along.dtype))
        h = self.site.project(x, self.A)  # (..., K R)
        routed = h.view(*c.shape, method.rank) * c[..., None]
        return self.site.expand(routed.flatten(-2), self.B)
