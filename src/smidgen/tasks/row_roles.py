"""What columns say of rows beside what is learned: which belong together, and what each counts.

group     rows of one user or document stay on one side of a split; else equal texts do
weight    what a row counts in the loss: w / mean of the training rows' w.  Figures count every row once.
"""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..data.table import Table
from ..data.values import number
from .base import Asked

GROUP_AND_WEIGHT = ("group", "weight")


def row_columns(train: Table, asked: Asked, roles: Sequence[str]) -> dict[str, str]:
    """Role -> column, of the roles that were said; entered in the plan.  Raises DataError for a column not there."""
    columns = {role: name for role, name in asked.columns.items() if role in roles}
    for role, name in columns.items():
        train.column(name)
        asked.plan.decide(f"{role} column", name, name, "")
    return columns


def without(table: Table, columns: Mapping[str, str]) -> Table:
    """The table without these columns, so that none is taken for another role.   columns: role -> name."""
    others = {name: values for name, values in table.columns.items() if name not in columns.values()}
    return Table(others, table.origins)


def groups_of(table: Table, columns: Mapping[str, str]) -> Sequence[Hashable] | None:
    """The column of groups, if one was said."""
    return table.column(columns["group"]) if "group" in columns else None


def wrong_roles(table: Table, columns: Mapping[str, str]) -> dict[int, str]:
    """What is wrong with the groups and weights of rows, where the table has them."""
    problems: dict[int, str] = {}
    if (name := columns.get("group", "")) in table.columns:
        for i, group in enumerate(table.column(name)):
            if group is None or group == "" or isinstance(group, list | dict):
                problems[i] = f'column "{name}": {group!r:.40} is no group; it must be a name or number'
    if (name := columns.get("weight", "")) in table.columns:
        for i, weight in enumerate(table.column(name)):
            if (found := number(weight)) is None or found < 0:
                problems[i] = f'column "{name}": {weight!r:.40} is no weight; it must be a number of at least 0'
    return problems


def weights_of(table: Table, columns: Mapping[str, str], mean: float | None) -> Tensor | None:
    """(N,), over a mean, their own if there is none; None where no column says them."""
    name = columns.get("weight")
    if name is None or name not in table.columns:
        return None
    weights = torch.tensor([number(value) for value in table.column(name)])
    return weights / (weights.mean() if mean is None else torch.tensor(mean)).clamp_min(1e-12)


def mean_weight(train: Table, columns: Mapping[str, str]) -> float | None:
    """Of the training rows: what a weight of 1 on average is told by."""
    if "weight" not in columns:
        return None
    values = [number(value) or 0.0 for value in train.column(columns["weight"])]
    return sum(values) / len(values)
