"""Arrow: route every token to the LoRA experts that it points along, without training.  Ostapenko et al. 2024,
arXiv:2405.11157, section 4.2; GenKnowSub, Bagherifard et al. 2025, ACL short papers 54: what is general is taken out.

    y' = W x + b + sum_k c_k B_k A_k x          c = softmax(|P x| / t) over the top_k largest, 0 elsewhere
    P_k = the first right singular vector of B_k A_k
    A_k, B_k less the mean A and the mean B of the `general` experts, if there are any

A_k: (R, I)   B_k: (O, R)   P: (K, I)   K experts; their own alpha / rank is part of B_k.   t: temperature.
No trainable parameters; K R (I + O) per site with `train_experts`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, require
from ..core.experts import expert_at, sites_of
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

    summary = "y' = W x + sum_k c_k B_k A_k x, c by direction"
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
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0")
        require(isinstance(self.rank, int) and self.rank > 0, f"rank is {self.rank}; it is at least 1")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None or not isinstance(site.kind, LinearKind | EmbeddingKind):
            return f"Arrow routes tokens, and {type(site.layer).__name__} is no layer that is called on tokens"
        return None

    def fitted(self, model: nn.Module) -> "Arrow":
        names = (*self.experts, *self.general)
        missing = [name for name in names if not sites_of(model, (name,))]
        if len(missing) == len(names) and self.train_experts:
            return self
        if missing:
            raise ConfigError(
                f"no adapter of the model is called {', '.join(missing)}. Arrow mixes adapters that live in it: "
                'load(model, "out/math", "math"), then Arrow(experts=("math", ...)). Fresh ones: train_experts=True'
            )
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


class ArrowAdapter(AdditiveAdapter):
    """The experts of one layer: A (K R, I), B (O, K R), and P (K, I) where they are not trained."""

    starts_as_base = mergeable = False
    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, method: Arrow, site: Site) -> None:
        super().__init__(site)
        self.method, self.is_taken = method, False
        K, wide = len(method.experts), len(method.experts) * method.rank
        for name, value in (("A", site.empty(wide, site.fan_in)), ("B", site.empty(site.fan_out, wide))):
            if method.train_experts:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value.detach())
        if not method.train_experts:
            self.register_buffer("P", site.empty(K, site.fan_in).detach())

    @torch.no_grad()
    def prepare(self) -> None:
        method, R = self.method, self.method.rank
        self.is_taken = any(expert_at(self.site, name) for name in method.experts)
        if not self.is_taken:
            return
        general = [self._expert(name)[:2] for name in method.general]
        self.A.zero_(), self.B.zero_()
        for i, name in enumerate(method.experts):
            A, B, scale = self._expert(name)
            for A_general, B_general in general:
                A, B = A - A_general / len(general), B - B_general / len(general)
            self.A[i * R : (i + 1) * R], self.B[:, i * R : (i + 1) * R] = A, scale * B
        if not method.train_experts:
            self.P.copy_(self.directions())

    def _expert(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A (R, I) and B (O, R) of an expert, filled up with zeros, and its scale; zeros where it has no part."""
        R, expert = self.method.rank, expert_at(self.site, name)
        A, B = self.A.new_zeros(R, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], R)
        found = expert.factors() if expert else (A[:0], B[:, :0])
        rank = len(found[0])
        if rank <= R:  # else it is another one of that name, and the file has ours
            A[:rank], B[:, :rank] = found
        return A, B, expert.scale if expert else 1.0

    def reset(self, generator: torch.Generator | None) -> None:
        if not self.is_taken:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)

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
