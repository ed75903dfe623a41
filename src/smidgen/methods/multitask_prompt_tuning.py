"""Multitask prompt tuning: one prompt for all tasks, and a product for each.  Wang et al. 2023, arXiv:2303.02861,
section 3.2, equation 1.

    model([P_t; embed(tokens)])        P_t = P * (U_t V_t)        P: (N, E)    U: (K, N, R)    V: (K, R, E)

N = length, E = width of the embedding, K = tasks, t = the task, R = rank, 1 in the paper, * element by element.   U V
starts as 1 everywhere, so every task starts from P.   Trainable parameters: N E + K R (N + E).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import AttachError, require
from ..core.method import method
from ..core.site import Site
from .prompt_tuning import PromptTuning, WordPrompt


@method("multitask_prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptTuning):
    """A prompt that tasks share, and what each makes of it; `model(..., task_ids=...)` says each row's task.

    length, init, init_ids: of the shared prompt, as in prompt tuning.
    tasks: K.   rank: R.   task: of a call that names none, as those of `generate` are; with one task it is that one.
    """

    tasks: int = 1
    rank: int = 1
    task: int | None = None

    summary = "model([P * (U_t V_t); embed(tokens)])"
    paper = "Wang et al. 2023, arXiv:2303.02861"
    disk = DiskNames(
        "MULTITASK_PROMPT_TUNING",
        fields={
            "length": "num_virtual_tokens",
            "init": "prompt_tuning_init",
            "tasks": "num_tasks",
            "rank": "num_ranks",
        },
        tensors={"shared.U": "prefix_task_cols", "shared.V": "prefix_task_rows"},
    )

    def check(self) -> None:
        super().check()
        require_whole(self, "tasks", "rank")
        known = self.task is None or 0 <= self.task < self.tasks
        require(known, f"task is {self.task}; of {self.tasks} tasks it is 0 to {self.tasks - 1}, or None")

    def shared(self, sites: tuple[Site, ...]) -> "TaskPrompts":
        return TaskPrompts(self, sites[0])


class TaskPrompts(WordPrompt):
    """P (N, E), U (K, N, R) and V (K, R, E)."""

    def __init__(self, method: MultitaskPromptTuning, site: Site) -> None:
        super().__init__(method, site)
        self.task_ids: Tensor | None = None  # of the call that runs
        self.task = 0 if method.tasks == 1 else method.task
        self.U = site.empty(method.tasks, method.length, method.rank)
        self.V = site.empty(method.tasks, method.rank, site.fan_out)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        for factor, first in ((self.U, self.U[..., 0]), (self.V, self.V[:, 0])):
            nn.init.normal_(factor, std=0.02, generator=generator)  # ranks after the first have to differ
            nn.init.ones_(first)

    def take(self, kwargs: dict[str, Any]) -> None:
        self.task_ids = kwargs.pop("task_ids", None)

    def forward(self) -> Tensor:
        if self.task_ids is not None:
            return self.prompt * (self.U[self.task_ids] @ self.V[self.task_ids])  # (B, N, E)
        if self.task is None:
            raise AttachError(
                f"the call names no task: model(..., task_ids=...) with one of 0 to {len(self.U) - 1} for each row, or "
                "MultitaskPromptTuning(task=...) for all"
            )
        return self.prompt * (self.U[self.task] @ self.V[self.task])
