"""Composition: which adapters act, in what arrangement.  Expressions are data; activating one makes a plan per layer.

    "style"                          one adapter
    Stack("style", "steer")          the second sees the first's output as its base
    Weighted(style=0.7, polite=0.3)  base + sum of w * (what each changes)
    Rows("style", None, "polite")    a mixed batch: one adapter per row
    None                             the base model

A plan is the same tree holding the adapters found at one layer.  It is called like an adapter, `plan(call, *args)`, and
knows whether it is `additive` and acts `by_row`.  A layer that has none of the adapters gets None and costs nothing.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .adapter import Adapter, AdditiveAdapter, Call
from .errors import AttachError
from .low_rank import LowRankAdapter
from .row_slots import Slots, SlotsPlan, Terms

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


def plan_for(expression: Expression, find: Find, slots: Slots | None = None) -> Plan | None:
    """The plan of an expression at one layer, where `find` gives the adapter of a name there, or None.

    slots: where mixed rows keep copies of low-rank adapters, from one plan of the layer to the next.
    """
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
    groups = tuple((plan_for(part, find), rows, index) for part, rows, index in _grouped(expression))
    if all(plan is None for plan, _, _ in groups):
        return None
    return RowsPlan(groups, len(expression.parts), Slots() if slots is None else slots)


@functools.lru_cache(maxsize=16)  # the same for every layer
def _grouped(expression: Rows) -> "tuple[tuple[Expression, tuple[int, ...], Tensor], ...]":
    """Each distinct composition, and which rows have it."""
    groups: dict[Expression, list[int]] = {}
    for row, part in enumerate(expression.parts):
        if isinstance(part, Rows):
            raise AttachError("Rows inside Rows has no meaning: a row has one composition")
        groups.setdefault(part, []).append(row)
    return tuple((part, tuple(rows), torch.tensor(rows)) for part, rows in groups.items())


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


Group = tuple[Plan | None, tuple[int, ...], Tensor]  # a plan, and the numbers of its rows twice


class RowsPlan:
    """A mixed batch at one layer: the base runs once where all changes are added or all scale, else once per group.

    Low-rank changes of a linear layer run together, in slots; others in turn, each for its group of rows.
    Rows may have been repeated evenly on the way (beam search, windows of an image): row r then owns a block of rows.
    An input that all rows share (positions) is given to each.
    """

    def __init__(self, groups: tuple[Group, ...], rows: int, slots: Slots) -> None:
        self.groups, self.rows = groups, rows
        self.additive = all(plan is None or plan.additive for plan, _, _ in groups)
        self.by_row = all(plan is None or plan.by_row for plan, _, _ in groups)
        if not self.additive:
            numbers = torch.tensor([number for number, (_, own, _) in enumerate(groups) for _ in own])
            self.inverse = torch.argsort(torch.cat([index for _, _, index in groups]))
            self.group_of = numbers[self.inverse]  # of each row
        found = [(group, _terms(group[0])) for group in groups if group[0] is not None]
        self.others = tuple(group for group, terms in found if terms is None)
        thin = [(terms, rows) for (_, rows, _), terms in found if terms is not None]
        self.thin = SlotsPlan(thin, rows, slots) if thin and self.additive else None
        self.scaling = all(plan is None or getattr(plan, "scaled_side", None) is not None for plan, _, _ in groups)

    def __call__(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.shape[0] == 1:
            x = x.expand(self.rows, *x.shape[1:])
        if x.shape[0] % self.rows or not x.shape[0]:
            raise AttachError(
                f"Rows names {self.rows} rows, the batch has {x.shape[0]}: say one adapter (or None) for each row"
            )
        if len(self.groups) == 1:  # the same for all rows
            return cast(Plan, self.groups[0][0])(call, x, *args, **kwargs)
        if self.scaling:
            return self._scaled("output", call(self._scaled("input", x), *args, **kwargs))
        if not self.additive:
            outs = [
                call(self._of(x, index), *args, **kwargs)
                if plan is None
                else plan(call, self._of(x, index), *args, **kwargs)
                for plan, _, index in self.groups
            ]
            return _by_row(torch.cat(outs), self.rows)[self.inverse.to(x.device)].flatten(0, 1)
        y, others = call(x, *args, **kwargs), self.groups
        if self.thin is not None and (done := self.thin.run(y, x, call)) is not None:
            y, others = done, self.others
        changed = [(index, _delta(plan, self._of(x, index))) for plan, _, index in others if plan is not None]
        if not changed:
            return y
        by_row = _by_row(y, self.rows)
        changes = [_by_row(d.to(y.dtype), len(index)).expand(-1, *by_row.shape[1:]) for index, d in changed]
        index = torch.cat([index for index, _ in changed]).to(y.device)
        return by_row.index_add(0, index, torch.cat(changes)).flatten(0, 1)

    def _scaled(self, side: str, x: Tensor) -> Tensor:
        """x with the channels of each row scaled, where the row's adapter scales this side of the call."""
        adapters = [cast("Adapter | None", plan) for plan, _, _ in self.groups]
        vectors = [a.side_scale() if a is not None and a.scaled_side == side else None for a in adapters]
        site, l = next(((a.site, l) for a, l in zip(adapters, vectors, strict=True) if a and l is not None), (None, x))
        if site is None:
            return x
        less_one = (
            torch.stack([torch.ones_like(l) if own is None else own for own in vectors]) - 1
        )  # l would be rounded
        by_row = less_one.to(x.dtype)[self.group_of.to(x.device)]
        shape = site.channels(l, x).shape  # of one row's, to stand against its channels
        rows = _by_row(x, self.rows)
        return torch.addcmul(rows, rows, by_row.view(self.rows, *[1] * (x.ndim - len(shape)), *shape)).flatten(0, 1)

    def _of(self, x: Tensor, index: Tensor) -> Tensor:
        return _by_row(x, self.rows)[index.to(x.device)].flatten(0, 1)


def _by_row(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(0, (rows, -1))  # type: ignore[no-any-return, no-untyped-call]


def _terms(plan: Plan | None, weight: float = 1.0) -> Terms | None:
    """The plan as a weighted sum of low-rank changes of a linear layer, if it is one."""
    if isinstance(plan, LowRankAdapter):
        return ((plan, weight),) if plan.additive and plan.by_factors else None
    if isinstance(plan, StackPlan):
        return _joined(_terms(part, weight) for part in plan.plans)
    if isinstance(plan, WeightedPlan):
        return _joined(_terms(part, weight * own) for part, own in plan.parts)
    return None


def _joined(parts: Iterable[Terms | None]) -> Terms | None:
    found = list(parts)
    return None if any(terms is None for terms in found) else tuple(itertools.chain(*cast(list[Terms], found)))


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
