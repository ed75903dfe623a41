"""AdaMSS: small changes in subspaces of a weight, one for each cluster of outputs.  Zheng et al. 2025, NeurIPS 2025.

    [W b] ~ U diag(e) V          the rows of U are put into K clusters by k-means
    [W b]'_k = [W b]_k + B_k A_k V          for the rows of cluster k

V: (R, I + 1), (R, I) without a bias; it stays as it is.   A_k: (R_k, R)   B_k: (O_k, R_k), O_k outputs in cluster k.
A_k starts as the main directions of the cluster's rows of U, B_k at zero, so training starts from the base model.
R_k is `subspace_rank`, and no more than O_k.   Trainable parameters: sum_k R_k (R + O_k) per site.
With `target_subspaces` (adaptive subspace allocation) those that matter least stop learning, more and more of them.
Clusters are those that Hugging Face PEFT computes, with scikit-learn, so that its folders mean the same here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.checks import require_above_zero, require_schedule, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError
from ..core.method import Method, method
from ..core.projected import ProjectedAdapter
from ..core.site import Site
from ..core.subspaces import Importance, Subspaces, decomposed
from ..core.targets import last_match


@method("adamss")
@dataclass(frozen=True, kw_only=True)
class AdaMSS(Method):
    """Subspaces of weights.

    rank: R.   subspaces: K per site, where it has as many outputs.   subspace_rank: R_k.
    dynamic_rank: fewer, as many as directions whose singular values square to more than `threshold` of the first's.
    seed: of the decomposition.
    target_subspaces: of all sites together, how many learn to the end; None for all.   hold: share of the steps before
        the first one stops; settle: share after the last one has.   every: steps between two choices.
    exponent: of the schedule; higher takes more away early.   smoothing: of importance and of its uncertainty.
    sizes_pattern: (O_k, R_k) of the clusters by site, found from the model.
    """

    rank: int = 100
    subspaces: int = 5
    subspace_rank: int = 1
    dynamic_rank: bool = False
    threshold: float = 0.1
    seed: int = 0
    target_subspaces: int | None = None
    hold: float = 0.05
    settle: float = 0.5
    every: int = 10
    exponent: float = 3.0
    smoothing: tuple[float, float] = (0.85, 0.85)
    sizes_pattern: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    summary = "[W b]'_k = [W b]_k + B_k A_k V, by clusters of outputs"
    paper = "Zheng et al. 2025, AdaMSS: Adaptive Multi-Subspace Approach, NeurIPS 2025"
    reads_weight, on_stacks = True, False
    disk = DiskNames(
        "ADAMSS",
        fields={
            "rank": "r",
            "subspaces": "num_subspaces",
            "dynamic_rank": "use_dynamic_rank",
            "threshold": "svd_threshold",
            "seed": "random_seed",
        },
        kinds=("linear",),
        # which subspaces learned, and when, changes nothing once they have
        ignored=(
            *("use_asa", "asa_target_subspaces", "asa_schedule_exponent", "asa_importance_beta"),
            *("asa_uncertainty_beta", "init_warmup", "final_warmup", "mask_interval"),
        ),
    )

    def __post_init__(self) -> None:
        sizes = {site: tuple((int(O), int(R)) for O, R in value) for site, value in self.sizes_pattern.items()}
        object.__setattr__(self, "sizes_pattern", sizes)
        object.__setattr__(self, "smoothing", tuple(self.smoothing))
        super().__post_init__()

    def check(self) -> None:
        require_whole(self, "rank", "subspaces", "subspace_rank", "target_subspaces", "every")
        require_share(self, "threshold")
        require_above_zero(self, "exponent")
        require_schedule(self)

    def fitted(self, model: nn.Module) -> "AdaMSS":
        return replace(self, sizes_pattern={site.name: self._sizes(site) for site in self.resolve(model).sites})

    def _sizes(self, site: Site) -> tuple[tuple[int, int], ...]:
        if not site.stored.is_meta:
            return self.decomposed(site).sizes
        K = min(self.subspaces, site.fan_out)  # without the weight nobody knows: as if all clusters were of one size
        return tuple((n, min(n, self.subspace_rank)) for n in (len(range(k, site.fan_out, K)) for k in range(K)))

    def decomposed(self, site: Site) -> Subspaces:
        """The subspaces of this site's weight.  Raises MissingDependency."""
        return decomposed(
            _with_bias(site), self.rank, self.subspaces, self.subspace_rank, self.seed,
            threshold=self.threshold if self.dynamic_rank else None,
        )  # fmt: skip

    def build(self, site: Site) -> "AdaMSSAdapter":
        return AdaMSSAdapter(self, site)

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        parts = [part.importance for part in adapters.values() if isinstance(part, AdaMSSAdapter) and part.importance]
        first, final = int(self.hold * steps), steps - int(self.settle * steps)
        if self.target_subspaces is None:
            return
        for part in parts:
            part.hold_still()
        if first <= step <= final:
            for part in parts:
                part.observe(*self.smoothing)
            if step % self.every == 0 or step == final:
                total, left = sum(len(part.learns) for part in parts), 1 - (step - first) / max(1, final - first)
                _keep_best(parts, int(self.target_subspaces + (total - self.target_subspaces) * left**self.exponent))


def _with_bias(site: Site) -> Tensor:
    """[W b]: (O, I + 1), in fp32 on the CPU; W (O, I) where there is no bias."""
    W = site.weight().detach().float()
    return (W if site.bias is None else torch.cat([W, site.bias.detach().float().view(-1, 1)], 1)).cpu()


def _keep_best(parts: list[Importance], budget: int) -> None:
    """Of all subspaces that still learn, those with the highest scores go on."""
    scores = torch.cat([part.scores() for part in parts])  # -inf for those that do not
    learn = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    learn[scores.topk(min(budget, len(scores))).indices] = True
    learn &= scores > -torch.inf
    for part, choice in zip(parts, torch.split(learn, [len(part.learns) for part in parts]), strict=True):
        part.choose(choice)


def _block_diagonal(blocks: nn.ParameterList) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


class AdaMSSAdapter(ProjectedAdapter):
    """A_k and B_k at one site, V, and where each output stands among the clusters' rows."""

    additive = False  # its bias comes after the fused product
    V: Tensor
    places: Tensor

    def __init__(self, method: AdaMSS, site: Site) -> None:
        super().__init__(site)
        sizes = last_match(method.sizes_pattern, site, ())
        assert sizes, f"{site.name}: call fitted(model) first"
        self.method, self.with_bias, I = method, site.bias is not None, site.fan_in + (site.bias is not None)
        R = min(method.rank, site.fan_out, I)
        self.A = nn.ParameterList(site.empty(R_k, R) for _, R_k in sizes)
        self.B = nn.ParameterList(site.empty(O_k, R_k) for O_k, R_k in sizes)
        self.register_buffer("V", site.empty(R, I).detach())
        self.register_buffer("places", torch.empty(site.fan_out, dtype=torch.long, device=self.V.device))
        self.importance = Importance(self.A, self.B) if method.target_subspaces is not None else None

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        if self.V.is_meta:
            return
        found = self.method.decomposed(self.site)
        self.V.copy_(found.V)
        self.places.copy_(found.places)
        for A, B, start in zip(self.A, self.B, found.starts, strict=True):
            A.copy_(start)
            B.zero_()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.V[:, : self.site.fan_in], *self._both()

    def factors(self) -> tuple[Tensor, Tensor]:
        V, A, B = self.parts()
        return A @ V, B

    def bias_delta(self, rows: slice) -> Tensor:
        A, B = self._both()
        return B[rows] @ (A @ self.V[:, -1])

    def _both(self) -> tuple[Tensor, Tensor]:
        """A_k (sum R_k, R) of all clusters, and their B_k in the rows (O, sum R_k) of their outputs."""
        return torch.cat(list(self.A)), _block_diagonal(self.B).index_select(0, self.places)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.importance and self.training and torch.is_grad_enabled() and not self.followed:
            raise ConfigError(
                "AdaMSS lets subspaces stop while it trains (target_subspaces), and nothing tells it of the steps. "
                "Before the first: adapters.follow(optimizer, steps=...)"
            )
        y = super().forward(call, x, *args, **kwargs)
        return torch.add(y, self.site.channels(self.bias_delta(slice(None)), y)) if self.with_bias else y
