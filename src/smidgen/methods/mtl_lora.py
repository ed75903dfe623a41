"""MTL-LoRA: one low-rank change for several tasks, with a small matrix and a mixture for each.  Yang et al. 2024,
arXiv:2410.09437, equations 3-5.

    W_t = W + s B_t L_t A          B_t = sum_i softmax(w_t / tau)_i B^i          s = alpha / R

A: (R, I), of all tasks   L_t: (R, R), of task t   B^1 ... B^n: (O, R), of all tasks   w_t: (n,), how task t mixes them
A starts as LoRA's, L_t as the identity, w_t and B^i at zero, so training starts from the base model.
Trainable parameters: R (I + n O) + K (R^2 + n) per site, K the number of tasks.

    model(input_ids=ids, task_ids=tensor)          which task each row is: core/tasks.py
    MTLLoRA(tasks=4, task=2)                       all rows are of task 2, and its change can be merged
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.checks import require_above_zero, require_finite, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Resolution
from ..core.tasks import Tasks, TasksAdapter


@method("mtl_lora")
@dataclass(frozen=True, kw_only=True)
class MTLLoRA(Method):
    """One low-rank change for several tasks.

    tasks: K.   task: of all rows; None where each call says `task_ids`.
    rank: R.   alpha: the change is scaled by alpha / R.   dropout: of the adapter's input while training.
    mixtures: n, how many B there are.   temperature: tau; a low one lets each task take one B.
    """

    tasks: int = 1
    task: int | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    mixtures: int = 3
    temperature: float = 0.5

    summary = "W_t = W + s B_t L_t A, B_t mixed by task"
    paper = "Yang et al. 2024, arXiv:2410.09437"
    faster = ("B",)
    on_stacks = False
    disk = DiskNames("SMIDGEN_MTL_LORA")

    def check(self) -> None:
        require_whole(self, "tasks", "rank", "mixtures")
        require_finite(self, "alpha")
        require_share(self, "dropout")
        require_above_zero(self, "temperature")
        known = self.task is None or 0 <= self.task < self.tasks
        require(known, f"task is {self.task}; of {self.tasks} tasks it is 0 to {self.tasks - 1}, or None")

    @property
    def only_task(self) -> int | None:
        """The task of all rows, if they have the same."""
        return 0 if self.tasks == 1 else self.task

    def accepts(self, site: Site) -> str | None:
        by_row = self.only_task is None
        if by_row and not site.path and site.kind is None:
            return None  # the model, which is told the tasks
        if reason := super().accepts(site):
            return reason
        if by_row and (site.parameter is not None or not isinstance(site.kind, LinearKind)):
            return f"each row has its own matrices, which only linear layers take; this is {type(site.layer).__name__}"
        return None

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        top = (Site("", model),) if self.only_task is None else ()
        return Resolution(model, (*top, *found.sites), found.passed_over)

    def build(self, site: Site) -> Adapter:
        return TasksAdapter(site) if self.only_task is None and not site.path else MTLLoRAAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> Tasks | None:
        return Tasks(self.tasks) if self.only_task is None else None


class MTLLoRAAdapter(LowRankAdapter):
    """A (R, I), and B (n, O, R) of all mixtures, L (K, R, R) and w (K, n) of all tasks, at one site."""

    def __init__(self, method: MTLLoRA, site: Site) -> None:
        super().__init__(site, scale=method.alpha / method.rank, dropout=method.dropout)
        self.temperature, self.task = method.temperature, method.only_task
        self.A = site.empty(method.rank, site.fan_in)
        self.B = site.empty(method.mixtures, site.fan_out, method.rank)
        self.L = site.empty(method.tasks, method.rank, method.rank)
        self.w = site.empty(method.tasks, method.mixtures)
        if self.task is None:
            self.plain = False  # each row has its own change, so nothing is fused
            self.by_row = self.mergeable = False  # type: ignore[misc]

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        for L in self.L:
            nn.init.eye_(L)
        nn.init.zeros_(self.w)
        nn.init.zeros_(self.B)

    def of_tasks(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """L_t A (B, R, I) and B_t (B, O, R) of each of these tasks (B,)."""
        mix = torch.softmax(self.w[tasks] / self.temperature, 1)
        return self.L[tasks] @ self.A, torch.einsum("bn,nor->bor", mix, self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        mix = torch.softmax(self.w[self.task] / self.temperature, 0)
        return self.L[self.task] @ self.A, torch.tensordot(mix, self.B, 1)

    def delta(self, x: Tensor) -> Tensor:
        if self.task is not None:
            return super().delta(x)
        tasks, rows = cast(Tasks, self.shared).of_rows(self.dropped(x), self.site)
        A, B = self.of_tasks(tasks)
        h = rows.bmm(A.to(x.dtype).mT).bmm(B.to(x.dtype).mT) * self.scale
        return h.view(*x.shape[:-1], -1)
