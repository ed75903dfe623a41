"""AdaLoRA: spend a budget of ranks where they matter.  Zhang et al. 2023, arXiv:2303.10512, equations 3-4 and 7-12.

    W' = W + s B diag(E) A          s = alpha / R0          penalty w mean |A A^T - 1|_F, |B^T B - 1|_F

A: (R, I)   E: (R, 1)   B: (O, R)   R0 = ranks per site at the start.   E starts at zero, so training starts from the
base model.  After each step every triplet (row of A, entry of E, column of B) has a score, its entry's smoothed
sensitivity |w dL/dw| times the uncertainty of that, plus the means of its row's and column's; the E of all triplets but
the best ones of the model is set to zero.  How many are kept falls with the cube of time, equation 12, from R0 to
`rank` per site.   Trainable parameters: R (I + O + 1) per site; a saved adapter has only the triplets that were kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.checks import require_above_zero, require_schedule, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, require
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match

_SMOOTHED = ("A", "E", "B")


@method("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Low-rank change whose ranks are allocated while training; `AdapterSet.follow` lets it see the steps.

    rank: kept per site, on average.   start_rank: R0.   alpha: the change is scaled by alpha / R0.
    hold: share of the steps before the first rank goes.   settle: share at the end, when the choice is final.
    every: steps between two choices.   orthogonality: w.   smoothing: of sensitivity and of uncertainty, beta 1 and 2.
    dropout: probability of dropping an entry of the adapter's input while training.
    rank_pattern: ranks of the sites that a glob matches, if these are not R0: as a saved adapter has them.
    """

    rank: int = 8
    start_rank: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    hold: float = 0.1
    settle: float = 0.3
    every: int = 1
    orthogonality: float = 0.5
    smoothing: tuple[float, float] = (0.85, 0.85)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    summary = "W' = W + s B diag(E) A, ranks by importance"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    faster = ("B",)
    on_stacks = False
    disk = DiskNames(
        "ADALORA",
        fields={
            "rank": "target_r",
            "start_rank": "init_r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "orthogonality": "orth_reg_weight",
            "every": "deltaT",
        },
        tensors={"A": "lora_A", "B": "lora_B", "E": "lora_E"},
        kinds=("linear", "conv1d-transposed", "conv"),
        ignored=("r", "beta1", "beta2", "tinit", "tfinal", "total_step", "rank_pattern", "init_lora_weights"),
    )

    def check(self) -> None:
        require(0 < self.rank <= self.start_rank, f"rank is {self.rank}; it is 1 to start_rank, {self.start_rank}")
        require_whole(self, "start_rank", "every")
        require_above_zero(self, "alpha")
        require_share(self, "dropout")
        require_schedule(self)

    def build(self, site: Site) -> "AdaLoRAAdapter":
        return AdaLoRAAdapter(self, site)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        ours = [adapter for adapter in adapters.values() if isinstance(adapter, AdaLoRAAdapter) and len(adapter.E)]
        if not self.orthogonality or not ours:
            return None
        squares = [square for adapter in ours for square in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B)]
        away = [torch.linalg.matrix_norm(square - torch.eye(len(square)).to(square)) for square in squares]
        return self.orthogonality * torch.stack(away).mean()

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        ours = [adapter for adapter in adapters.values() if isinstance(adapter, AdaLoRAAdapter)]
        have, want = sum(len(adapter.E) for adapter in ours), self.rank * len(ours)
        first, final = int(self.hold * steps), steps - int(self.settle * steps)
        if have <= want:
            return
        if step <= final:
            for adapter in ours:
                adapter.observe(self.smoothing)
        if step >= final or (step > first and step % self.every == 0):
            left = max(0.0, 1 - (step - first) / (final - first))
            if step <= final:
                _keep_best(ours, int(want + (have - want) * left**3))
            for adapter in ours:
                adapter.E.mul_(adapter.kept)

    def at_rest(
        self, tensors: Mapping[Site, Mapping[str, Tensor]]
    ) -> tuple[Method, Mapping[Site, Mapping[str, Tensor]]]:
        kept = {site: held["E"].flatten() != 0 for site, held in tensors.items()}
        if not any(mask.any() for mask in kept.values()) or all(mask.all() for mask in kept.values()):
            return self, tensors  # fresh, or nothing is masked
        pruned = {
            site: {"A": held["A"][kept[site]], "E": held["E"][kept[site]], "B": held["B"][:, kept[site]]}
            for site, held in tensors.items()
        }
        return replace(self, rank_pattern={site.name: int(mask.sum()) for site, mask in kept.items()}), pruned


class AdaLoRAAdapter(LowRankAdapter):
    """A, E and B at one site, and what is known of their importance."""

    kept: Tensor

    def __init__(self, method: AdaLoRA, site: Site) -> None:
        scale = method.alpha / (method.start_rank + 1e-5)  # the authors' and HF PEFT's, so that folders mean the same
        super().__init__(site, scale=scale, dropout=method.dropout)
        rank = last_match(method.rank_pattern, site, method.start_rank)
        self.allocates = method.rank < method.start_rank and not method.rank_pattern
        self.A, self.E, self.B = site.empty(rank, site.fan_in), site.empty(rank, 1), site.empty(site.fan_out, rank)
        self.register_buffer("kept", torch.ones(rank, 1, device=self.E.device), persistent=False)
        for name in _SMOOTHED if self.allocates else ():
            parameter = self.get_parameter(name)
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(parameter), persistent=False)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.E)
        nn.init.normal_(self.A, std=0.02, generator=generator)
        nn.init.normal_(self.B, std=0.02, generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.E, self.B

    @property
    def by_factors(self) -> bool:
        return self.runs_as(AdaLoRAAdapter)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.allocates and self.training and torch.is_grad_enabled() and not self.followed:
            raise ConfigError(
                "AdaLoRA takes ranks away while it trains, and nothing tells it of the steps. Before the first: "
                "adapters.follow(optimizer, steps=...)"
            )
        return super().forward(call, x, *args, **kwargs)

    def observe(self, smoothing: tuple[float, float]) -> None:
        """Equations 8-10: the sensitivity of each entry, smoothed, and how much it varies."""
        for name in _SMOOTHED:
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                continue
            smooth, varies = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = (parameter * parameter.grad).abs()
            smooth.lerp_(now, 1 - smoothing[0])
            varies.lerp_((now - smooth).abs(), 1 - smoothing[1])

    def scores(self) -> Tensor:
        """Equation 7: of each triplet (R,)."""
        A, E, B = (self.get_buffer(f"sensitivity_{n}") * self.get_buffer(f"uncertainty_{n}") for n in _SMOOTHED)
        return A.mean(1) + E[:, 0] + B.mean(0)


def _keep_best(adapters: list[AdaLoRAAdapter], budget: int) -> None:
    """Equation 6: of all triplets of the model those with the highest scores are kept."""
    scores = torch.cat([adapter.scores().cpu() for adapter in adapters])
    kept = torch.zeros_like(scores)
    kept[scores.topk(budget).indices] = 1
    for adapter, part in zip(adapters, torch.split(kept, [len(adapter.E) for adapter in adapters]), strict=True):
        adapter.kept.copy_(part[:, None])
