"""What tasks have in common where they judge: means over rows, rows that one of two has right, rows seen before."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..data.split import rows_seen
from .base import Example


def counted(values: Tensor) -> Tensor:
    """`Task.parts` of a metric that is the mean of these values (N,): each beside a 1 that counts rows, (N, 2)."""
    return torch.stack([values, torch.ones_like(values)], dim=1)


def contrasted(base: Tensor, tuned: Tensor, words: Callable[[int], tuple[str, str, str, str]]) -> list[Example]:
    """The rows that exactly one of two has right.

    base, tuned: (N,) bool, what each has right.   words: of a row its text, the truth, what base and what tuned say.
    """
    found = []
    for i in (base != tuned).nonzero()[:, 0].tolist():
        text, truth, by_base, by_tuned = words(i)
        better: Literal["base", "tuned"] = "tuned" if tuned[i] else "base"
        found.append(Example(text=text, truth=truth, base=by_base, tuned=by_tuned, better=better))
    return found


def seen_before(train: Iterable[Hashable], test: Sequence[Hashable], what: str) -> list[str]:
    """The remark that test rows stand in training too, if some do.   what: they are, "texts"."""
    if not (again := rows_seen(train, test)):
        return []
    return [
        f"{again} of {len(test)} test {what} stand in the training rows too: the figures are flattered by that much"
    ]
