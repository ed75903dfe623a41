"""Poly: skills, low-rank changes that tasks mix in their own proportions.  Ponti et al. 2022, arXiv:2202.13914.

    y' = W x + b + B_t A_t x / R          A_t = sum_s z_ts A_s          B_t = sum_s z_ts B_s
    z_ts = sigmoid(l_ts) / sum_s' sigmoid(l_ts')

A_s: (R, I)   B_s: (O, R)   S skills of rank R; l: (N, S) for N tasks, at each site.   With Q splits the channels of
input and output are cut into Q parts, each with proportions of its own (multi-head routing, Caccia et al. 2022,
arXiv:2211.03831).   B starts at zero, so training starts from the base model.
Trainable parameters: S R (I + O) + N Q S per site.

    model(input_ids=ids, task_ids=tensor)          which task each row is, where there is more than one
    with for_tasks(model, tensor): model.generate(...)          the same, for code that calls the model itself
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, AdditiveAdapter, Call
from ..core.attach import held, is_adapted
from ..core.disk_names import DiskNames
from ..core.errors import AttachError, require
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, Shared, method
from ..core.running import Running
from ..core.site import Site
from ..core.targets import Resolution


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
        for name in ("rank", "skills", "tasks", "splits"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} is {value}; it is a whole number of at least 1")

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


@contextmanager
def for_tasks(model: nn.Module, task_ids: Tensor) -> Iterator[None]:
    """Within this context the rows of every batch are of these tasks (B,), unless a call says its own `task_ids`."""
    here = held(model)._modules.values() if is_adapted(model) else ()
    found = [cast(Tasks, part.shared) for part in here if isinstance(part, TasksAdapter)]
    require(bool(found), f"no adapter of several tasks lives in this {type(model).__name__}", AttachError)
    before = [shared.within for shared in found]
    for shared in found:
        shared.within = task_ids
    try:
        yield
    finally:
        for shared, ids in zip(found, before, strict=True):
            shared.within = ids


class Tasks(Shared):
    """Which task each row is."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks, self.running = tasks, Running()
        self.within: Tensor | None = None

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw."""


class TasksAdapter(Adapter):
    """At the model: takes `task_ids` from its call."""

    by_row = weightable = mergeable = False

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        shared = cast(Tasks, self.shared)
        ids = kwargs.pop("task_ids", shared.within)
        if ids is None:
            raise AttachError(f"which of the {shared.tasks} tasks is each row? Say model(..., task_ids=tensor)")
        ids = torch.as_tensor(ids).long().flatten()
        if not 0 <= int(ids.min()) <= int(ids.max()) < shared.tasks:
            raise AttachError(f"task_ids are {sorted(set(ids.tolist()))[:8]}; the tasks are 0 to {shared.tasks - 1}")
        shared.running.value = ids
        return call(*args, **kwargs)


class PolyAdapter(LowRankAdapter):
    """A (Q, S, I/Q, R), B (Q, S, R, O/Q) and l (N, Q S) at one site, in the shapes of HF PEFT."""

    def __init__(self, method: Poly, site: Site) -> None:
        super().__init__(site, scale=1 / method.rank)
        Q, S, R = method.splits, method.skills, method.rank
        self.A = site.empty(Q, S, site.fan_in // Q, R)
        self.B = site.empty(Q, S, R, site.fan_out // Q)
        self.logits = site.empty(method.tasks, Q * S)
        self.sampled, self.by_task = method.sampled, method.tasks > 1
        self.by_row = self.mergeable = not self.by_task  # type: ignore[misc]

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

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.by_task:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self.by_task:
            return super().delta(x)
        ids = cast(Tensor, cast(Tasks, self.shared).running.value).to(self.logits.device)
        times, rest = divmod(len(x), len(ids))  # rows may have been repeated evenly on the way, as beam search does
        if rest or not times:
            raise AttachError(f"task_ids names {len(ids)} rows, the batch has {len(x)} at {self.site.name}")
        A, B = self.mixed(self.logits[ids])
        rows = x.reshape(len(ids), -1, x.shape[-1])
        h = rows.bmm(A.to(x.dtype)).bmm(B.to(x.dtype)) * self.scale
        return h.view(*x.shape[:-1], -1)
