"""Mixed rows for adapters that cannot act row by row inside a layer (prompts, prefixes, changed parameters).

The batch is split at the model: rows with the same composition run together as one call of the model, one group after
another, and their outputs are put back in the order of the batch.  Always right, at the price of one call per group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import attach as mechanism
from .composition import Expression, Rows
from .errors import AttachError


def run_apart(model: nn.Module, rows: Rows, set_plans: Callable[[Expression], None]) -> None:
    """Make the (substituted) model split every batch by `rows`; `set_plans` makes an expression act everywhere."""
    set_plans(None)
    mechanism.set_plans(model, RowsApart(model, rows, set_plans), {})


class RowsApart:
    """The plan at the model's own call that runs each group of rows by itself."""

    additive = by_row = False

    def __init__(self, model: nn.Module, rows: Rows, set_plans: Callable[[Expression], None]) -> None:
        self.model, self.rows, self.set_plans = model, rows, set_plans
        self.groups: dict[Expression, list[int]] = {}
        for row, part in enumerate(rows.parts):
            self.groups.setdefault(part, []).append(row)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise AttachError(
                "rows with prompts, prefixes or changed parameters cannot share one cache: "
                "generate for each adapter in turn"
            )
        outputs = []
        try:
            for expression, rows in self.groups.items():
                mechanism.set_plans(self.model, None, {})  # the model itself need not be a site of the expression
                self.set_plans(expression)
                some_args, some_kwargs = tree_map(lambda leaf: self._pick(leaf, rows), (args, kwargs))  # noqa: B023
                outputs.append(mechanism.planned_call(self.model, call)(*some_args, **some_kwargs))
        finally:
            run_apart(self.model, self.rows, self.set_plans)
        order = torch.argsort(torch.tensor([row for rows in self.groups.values() for row in rows]))
        return tree_map(lambda *leaves: _join(leaves, order), *outputs)

    def _pick(self, leaf: Any, rows: list[int]) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == len(self.rows.parts):
            return leaf[torch.tensor(rows, device=leaf.device)]
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] != 1:
            raise AttachError(
                f"Rows names {len(self.rows.parts)} rows, the batch has {leaf.shape[0]}: "
                "say one adapter (or None) for each row"
            )
        return leaf


def _join(leaves: tuple[Any, ...], order: Tensor) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    if leaves[0].ndim == 0:
        raise AttachError("a model run apart by rows has no single loss: ask for logits, without labels")
    return torch.cat(leaves)[order.to(leaves[0].device)]
