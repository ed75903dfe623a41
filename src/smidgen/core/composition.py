"""Composition: which adapters act, in what arrangement.  Expressions are data; activating one makes a plan per layer.

    "style"                          one adapter
    Stack("style", "steer")          the second sees the first's output as its base
    Weighted(style=0.7, polite=0.3)  base + sum of w * (what each changes)
    Rows("style", None, "polite")    a mixed batch: one adapter per row
    None                             the base model

A plan is the same tree holding the adapters found at one layer.  It is called like an adapter, `plan(call, *args)`, and
knows whether it is `additive` and acts `by_row`.  A layer that has none of the adapters gets None and costs nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .adapter import Adapter, AdditiveAdapter, Call
from .errors import AttachError

Find = Callable[[str], Adapter | None]
Merged = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, init=False)
class Stack:
    """Adapters one after another: each sees the output of those before it as its base."""

    parts: "tuple[Expression, ...]"

    def __init__(self, *parts: "Expression") -> None:
        if any(isinstance(part, Rows) for part in parts):
            raise AttachError('Rows stands outermost, one composition per row: Rows(Stack("a", "b"), None)')
        object.__setattr__(self, "parts", tuple(part for part in parts if part is not None))


@dataclass(frozen=True, init=False)
class Weighted:
    """base + sum of w * (what each changes).   Weighted(style=0.7, polite=0.3) or Weighted({"style": 0.7})."""

    parts: "tuple[tuple[Expression, float], ...]"

    def __init__(self, parts: "Mapping[str, float] | None" = None, /, **named: float) -> None:
        both = {**(parts or {}), **named}
        object.__setattr__(self, "parts", tuple((name, float(weight)) for name, weight in both.items()))


@dataclass(frozen=True, init=False)
class Rows:
    """A mixed batch: what acts on each row, None for the base model."""

    parts: "tuple[Expression, ...]"

    def __init__(self, *parts: "Expression") -> None:
        object.__setattr__(self, "parts", tuple(parts))


Expression = str | Stack | Weighted | Rows | None


def names_in(expression: Expression) -> Iterator[str]:
    """The adapter names that an expression mentions, repeats included."""
    if isinstance(expression, str):
        yield expression
    elif isinstance(expression, Weighted):
        for part, _ in expression.parts:
            yield from names_in(part)
    elif isinstance(expression, Stack | Rows):
        for part in expression.parts:
            yield from names_in(part)


def weighted_in(expression: Expression) -> Iterator[str]:
    """The adapter names that an expression weighs."""
    if isinstance(expression, Weighted):
        yield from names_in(expression)
    elif isinstance(expression, Stack | Rows):
        for part in expression.parts:
            yield from weighted_in(part)


def to_data(expression: Expression) -> Any:
    """The expression as JSON data; `from_data` reads it back."""
    if isinstance(expression, Weighted):
        return {"weighted": [[to_data(part), weight] for part, weight in expression.parts]}
    if isinstance(expression, Stack | Rows):
        return {type(expression).__name__.lower(): [to_data(part) for part in expression.parts]}
    return expression


def from_data(data: Any) -> Expression:
    """An expression from JSON data.  Raises AttachError if it is none."""
    if data is None or isinstance(data, str):
        return data
    if isinstance(data, dict) and len(data) == 1:
        ((kind, parts),) = data.items()
        if kind == "stack" and isinstance(parts, list):
            return Stack(*map(from_data, parts))
        if kind == "rows" and isinstance(parts, list):
            return Rows(*map(from_data, parts))
        if kind == "weighted" and isinstance(parts, list) and all(map(_is_weighed, parts)):
            return Weighted({cast(str, from_data(part)): float(weight) for part, weight in parts})
    raise AttachError(
        f"{data!r} is no composition; write a name, {{stack: [...]}}, {{weighted: [[name, weight], ...]}} or "
        "{rows: [...]}"
    )


def _is_weighed(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and isinstance(part[1], int | float)


class Plan(Protocol):
    """What acts at one layer: an adapter, or several arranged."""

    @property
    def additive(self) -> bool: ...
    @property
    def by_row(self) -> bool: ...
    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Any: ...


def plan_for(expression: Expression, find: Find) -> Plan | None:
    """The plan of an expression at one layer, where `find` gives the adapter of a name there, or None."""
    if expression is None:
        return None
    if isinstance(expression, str):
        return find(expression)
    if isinstance(expression, Stack):
        plans = [plan for part in expression.parts if (plan := plan_for(part, find)) is not None]
        return plans[0] if len(plans) == 1 else StackPlan(tuple(plans)) if plans else None
    if isinstance(expression, Weighted):
        parts = [(plan, weight) for part, weight in expression.parts if (plan := plan_for(part, find)) is not None]
        if not parts:
            return None
        if all(getattr(plan, "observes", False) for plan, _ in parts):  # there is nothing to weigh
            return StackPlan(tuple(plan for plan, _ in parts))
        return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else WeightedPlan(tuple(parts))
    return _rows_plan(expression, find)


def _rows_plan(expression: Rows, find: Find) -> "Plan | None":
    groups: dict[Expression, list[int]] = {}
    for row, part in enumerate(expression.parts):
        if isinstance(part, Rows):
            raise AttachError("Rows inside Rows has no meaning: a row has one composition")
        groups.setdefault(part, []).append(row)
    plans = [(plan_for(part, find), torch.tensor(rows)) for part, rows in groups.items()]
    return None if all(plan is None for plan, _ in plans) else RowsPlan(tuple(plans), len(expression.parts))


def _delta(plan: Plan, x: Tensor) -> Tensor:
    return cast(AdditiveAdapter, plan).delta(x)  # additive plans have it


class StackPlan:
    """Plans nested around each other; the first is innermost."""

    def __init__(self, plans: tuple[Plan, ...]) -> None:
        self.plans = plans
        self.additive = all(plan.additive for plan in plans)
        self.by_row = all(plan.by_row for plan in plans)

    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        for plan in self.plans:
            call = _around(plan, call)
        return call(*args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        """The sum of all changes, where all are additive."""
        return cast(Tensor, sum(_delta(plan, x) for plan in self.plans))


class WeightedPlan:
    """base + sum of w * change; an additive plan's change needs no second base call."""

    def __init__(self, parts: tuple[tuple[Plan, float], ...]) -> None:
        self.parts = parts
        self.additive = all(plan.additive for plan, _ in parts)
        self.by_row = all(plan.by_row for plan, _ in parts)

    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        base = out = call(*args, **kwargs)
        for plan, weight in self.parts:
            if plan.additive:
                out = _add(out, _delta(plan, args[0]), weight)
            else:
                changed = plan(call, *args, **kwargs)
                out = _add(out, _first(changed) - _first(base), weight)
        return out

    def delta(self, x: Tensor) -> Tensor:
        """The weighted sum of all changes, where all are additive."""
        return cast(Tensor, sum(weight * _delta(plan, x) for plan, weight in self.parts))


class RowsPlan:
    """A mixed batch at one layer: the base runs once where all changes are additive, per group where one is not.

    Rows may have been repeated evenly on the way (beam search, windows of an image): row r then owns a block of rows.
    An input that all rows share (positions) is given to each.
    """

    def __init__(self, groups: "tuple[tuple[Plan | None, Tensor], ...]", rows: int) -> None:
        self.groups, self.rows = groups, rows
        self.additive = all(plan is None or plan.additive for plan, _ in groups)
        self.by_row = all(plan is None or plan.by_row for plan, _ in groups)
        self.inverse = torch.argsort(torch.cat([index for _, index in groups]))

    def __call__(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] == 1:
            x = x.expand(self.rows, *x.shape[1:])
        if len(self.groups) == 1:  # the same for all rows
            self._blocks(x)
            return cast(Plan, self.groups[0][0])(call, x, *args, **kwargs)
        if self.additive:
            y = call(x, *args, **kwargs)
            return torch.add(y, self.delta(x).to(y.dtype))
        blocks = self._blocks(x)
        outs = [
            call(rows, *args, **kwargs) if plan is None else plan(call, rows, *args, **kwargs)
            for plan, rows in zip((plan for plan, _ in self.groups), blocks, strict=True)
        ]
        return self._gather(outs, x)

    def delta(self, x: Tensor) -> Tensor:
        """The changes of all rows in the order of the batch, where all are additive."""
        blocks = self._blocks(x)
        deltas: list[Tensor | None] = [
            None if plan is None else _delta(plan, rows) for (plan, _), rows in zip(self.groups, blocks, strict=True)
        ]
        like = next(delta for delta in deltas if delta is not None)
        filled = [
            like.new_zeros(len(rows), *like.shape[1:]) if delta is None else delta.to(like.dtype)
            for delta, rows in zip(deltas, blocks, strict=True)
        ]
        return self._gather(filled, x)

    def _blocks(self, x: Tensor) -> list[Tensor]:
        repeat, rest = divmod(x.shape[0], self.rows)
        if rest or not repeat:
            raise AttachError(
                f"Rows names {self.rows} rows, the batch has {x.shape[0]}: say one adapter (or None) for each row"
            )
        by_row = x.view(self.rows, repeat, *x.shape[1:])
        return [by_row[index.to(x.device)].flatten(0, 1) for _, index in self.groups]

    def _gather(self, blocks: list[Tensor], x: Tensor) -> Tensor:
        repeat = x.shape[0] // self.rows
        out = torch.cat(blocks)
        return out.view(self.rows, repeat, *out.shape[1:])[self.inverse.to(out.device)].flatten(0, 1)


def merged(expression: Expression, find: Find, W: Tensor, b: Tensor | None, rows: slice) -> Merged:
    """Rows (rows, I) of a weight, and its bias, with everything that an expression changes at this site in them.

    Raises NotMergeable if an adapter changes activations, and AttachError for Rows: one weight cannot be many.
    """
    if expression is None:
        return W, b
    if isinstance(expression, str):
        adapter = find(expression)
        return (W, b) if adapter is None else adapter.merged(W, b, rows)
    if isinstance(expression, Stack):
        for part in expression.parts:
            W, b = merged(part, find, W, b, rows)
        return W, b
    if isinstance(expression, Weighted):
        W_out, b_out = W, b
        for part, weight in expression.parts:
            W_part, b_part = merged(part, find, W, b, rows)
            W_out = W_out + weight * (W_part - W)
            if b_part is not None and b is not None and b_out is not None:
                b_out = b_out + weight * (b_part - b)
        return W_out, b_out
    raise AttachError("Rows gives every row its own adapter; that is no single weight. Merge one of them by name.")


def _around(plan: Plan, call: Call) -> Call:
    return lambda *args, **kwargs: plan(call, *args, **kwargs)


def _first(out: Any) -> Tensor:
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def _add(out: Any, change: Tensor, weight: float) -> Any:
    if isinstance(out, tuple):  # an attention module or block: its first output is the hidden state
        return (_add(out[0], change, weight), *out[1:])
    return torch.add(out, change.to(out.dtype), alpha=weight)
