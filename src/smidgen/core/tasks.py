"""Which task each row of a batch is, for methods whose change of a weight differs from task to task.

    model(input_ids=ids, task_ids=tensor)          which task each row is
    with for_tasks(model, tensor): model.generate(...)          the same, for code that calls the model itself

An adapter at the model takes `task_ids` from its call; those at the layers ask `Tasks.of_rows`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter, Call
from .attach import held, is_adapted
from .errors import AttachError, require
from .method import Shared
from .running import Running
from .site import Site


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

    def of_rows(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """The tasks (B,) of the call that runs, and x as its rows (B, T, I).

        Rows may have been repeated evenly on the way, as beam search does: these count as one.   Raises AttachError.
        """
        ids = cast(Tensor, self.running.value).to(x.device)
        if not len(x) or len(x) % len(ids):
            raise AttachError(f"task_ids names {len(ids)} rows, the batch has {len(x)} at {site.name}")
        return ids, x.reshape(len(ids), -1, x.shape[-1])


class TasksAdapter(Adapter):
    """At the model: takes `task_ids` from its call."""

    by_row = weightable = mergeable = False

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
