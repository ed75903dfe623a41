"""Poly: skills, low-rank changes that tasks mix in their own proportions.  Ponti et al. 2022, arXiv:2202.13914.

    y' = W x + b + B_t A_t x / R          A_t = sum_s z_ts A_s          B_t = sum_s z_ts B_s
    z_ts = sigmoid(l_ts) / sum_s' sigmoid(l_ts')

A_s: (R, I)   B_s: (O, R)   S skills of rank R; l: (N, S) for N tasks, at each site.   With Q splits the channels of
input and output are cut into Q parts, each with proportions of its own (multi-head routing, Caccia et al. 2022,
arXiv:2211.03831).   B starts at zero, so training starts from the base model.
Trainable parameters: S R (I + O) + N Q S per site.

Where there is more than one task, core/tasks.py has how calls say them.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution
from ..core.tasks import Tasks, TasksAdapter


@method("poly")
@dataclass(frozen=True, kw_only=True)
class Poly(Method):
    """Skills that tasks share.

    rank: R.   skills: S.   tasks: N; with one, nobody has to say it and the change can be merged.   splits: Q.
    sampled: while training draw each sigmoid from a relaxed Bernoulli distribution, as the paper does.
    """

    rank: int = 8
    skills: int = 4
    tasks: int = 1
    splits: int = 1
    sampled: bool = True

    summary = "W' = W + B_t A_t / R, mixed by task"
    paper = "Ponti et al. 2022, arXiv:2202.13914"
    disk = DiskNames(
        "POLY",
        fields={"rank": "r", "skills": "n_skills", "tasks": "n_tasks", "splits": "n_splits"},
        tensors={"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"},
        kinds=("linear",),
        fixed={"poly_type": "poly"},
    )

    def check(self) -> None:
        require_whole(self, "rank", "skills", "tasks", "splits")

    def accepts(self, site: Site) -> str | None:
        if not site.path and site.kind is None and self.tasks > 1:
            return None  # the model, which is told the tasks
        if site.parameter is not None or not isinstance(site.kind, LinearKind):
            return f"each row has its own matrices, which only linear layers take; this is {type(site.layer).__name__}"
        uneven = [n for n in (site.fan_in, site.fan_out) if n % self.splits]
        return f"its {uneven[0]} channels cannot be cut into {self.splits} splits" if uneven else None

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        top = (Site("", model),) if self.tasks > 1 else ()
        return Resolution(model, (*top, *found.sites), found.passed_over)

    def build(self, site: Site) -> Adapter:
        return PolyAdapter(self, site) if site.path else TasksAdapter(site)

    def shared(self, sites: tuple[Site, ...]) -> "Tasks":
        return Tasks(self.tasks)


class PolyAdapter(LowRankAdapter):
    """A (Q, S, I/Q, R), B (Q, S, R, O/Q) and l (N, Q S) at one site, in the shapes of HF PEFT."""

    def __init__(self, method: Poly, site: Site) -> None:
        super().__init__(site, scale=1 / method.rank)
        Q, S, R = method.splits, method.skills, method.rank
        self.A = site.empty(Q, S, site.fan_in // Q, R)
        self.B = site.empty(Q, S, R, site.fan_out // Q)
        self.logits = site.empty(method.tasks, Q * S)
        self.sampled, self.by_task = method.sampled, method.tasks > 1
        if self.by_task:
            self.plain = False  # each row has its own change, so nothing is fused
            self.by_row = self.mergeable = False  # type: ignore[misc]

    def reset(self, generator: torch.Generator | None) -> None:
        bound = 1 / math.sqrt(self.A.shape[2])  # the authors' choice: as torch starts nn.Linear, within each split
        nn.init.uniform_(self.A, -bound, bound, generator=generator)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.logits, -1e-3, 1e-3, generator=generator)

    def mixed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A (N, I, R) and B (N, R, O) of the tasks with these logits (N, Q S)."""
        if self.training and self.sampled:
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + u.logit()  # logistic noise; temperature 1, as the authors have it
        z = logits.sigmoid().view(-1, *self.A.shape[:2])  # (N, Q, S)
        z = z / z.sum(-1, keepdim=True)
        A = torch.einsum("nqs,qsir->nqir", z, self.A).flatten(1, 2)
        return A, torch.einsum("nqs,qsro->nrqo", z, self.B).flatten(2)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.mixed(self.logits)
        return A[0].T, B[0].T

    def delta(self, x: Tensor) -> Tensor:
        if not self.by_task:
            return super().delta(x)
        tasks, rows = cast(Tasks, self.shared).of_rows(x, self.site)
        A, B = self.mixed(self.logits[tasks])
        h = rows.bmm(A.to(x.dtype)).bmm(B.to(x.dtype)) * self.scale
        return h.view(*x.shape[:-1], -1)
