"""What recommendations are learned and judged by: the score of the item that was taken next, and its rank.

    softmax    L = - log exp s(u, i) / sum_j exp s(u, j)          j: i and all items that u has not taken, or some drawn
    bpr        L = - mean_j log sigmoid(s(u, i) - s(u, j))        Rendle et al. 2009, arXiv:1205.2618

What u took before is not among the j: the base has learned to rank it high, and would only unlearn its taste.

A target is five numbers: ITEM, the row of the item; COUNTS, 1 if the interaction counts; ITEM_KIND as `Taken.kinds`;
USER_KIND, 0 for many interactions and 1 for few; POPULARITY, twice the rank that popularity alone would give.
An answer is the item's rank, 0 for that of popularity, and the rows of the items ranked first.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Example
from ..judging import contrasted
from .ranks import mrr_at, ndcg_at, ranks, recall_at
from .taken import HEAD, NEW, TAIL

ITEM, COUNTS, ITEM_KIND, USER_KIND, POPULARITY = range(5)
_SOME = {"head": (ITEM_KIND, HEAD), "tail": (ITEM_KIND, TAIL), "new": (ITEM_KIND, NEW)} | {
    "many": (USER_KIND, 0),
    "few": (USER_KIND, 1),
}
_ALL = 20_000  # items, up to which all are scored in a step
_DRAWN = 1000  # of more items
_METRICS = {"ndcg": ndcg_at, "recall": recall_at, "mrr": mrr_at}


def metrics_at(k: int) -> tuple[str, ...]:
    """The names of all metrics over the first k places: of all rows, then of those of each kind, "recall@10_tail"."""
    return tuple(f"{name}@{k}{some}" for some in ("", *(f"_{some}" for some in _SOME)) for name in _METRICS)


def values_of(metric: str, answers: Tensor, targets: Tensor) -> Tensor:
    """Per row the value of a metric, and 1 if the row is one of those it is about; (N, 2)."""
    name, _, rest = metric.partition("@")
    k, _, some = rest.partition("_")
    place = torch.where(answers[:, 0] > 0, answers[:, 0], targets[:, POPULARITY] / 2)
    about = targets[:, COUNTS] == 1
    if some:
        column, kind = _SOME[some]
        about = about & (targets[:, column] == kind)
    return torch.stack([_METRICS[name](place, int(k)) * about, about.float()], dim=1)


def contrasts(
    users: Sequence[str], items: Sequence[str], targets: Tensor, base: Tensor, tuned: Tensor, k: int
) -> list[Example]:
    """Rows whose item only one of two models has among its first `k`.   users: of the rows.   items: the names."""

    def words(i: int) -> tuple[str, str, str, str]:
        by_base, by_tuned = (
            f"{items[int(line[1])]} first; the right one on place {line[0]:g}" for line in (base[i], tuned[i])
        )
        return f"user {users[i]}", items[int(targets[i, ITEM])], by_base, by_tuned

    return contrasted(base[:, 0] <= k, tuned[:, 0] <= k, words)


def drawn_of(items: int) -> tuple[int | None, str]:
    """How many of the items are drawn for a step, None where all are scored; and why."""
    return (None, f"all {items:,} items are scored") if items <= _ALL else (_DRAWN, "there are many items")


def losses(kind: Literal["softmax", "bpr"], scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Per row the loss, (N,).

    scores: (N, items); where some were "drawn" (C,), (N, 1 + C), the row's own item first.
    """
    own, drawn = batch["targets"][:, ITEM, None], batch.get("drawn")
    if drawn is None:
        places = own
        scores = scores.masked_fill(_taken(scores, batch).scatter(1, own, False), -torch.inf)
    else:
        places = torch.zeros_like(own)
        out = torch.stack([torch.isin(drawn, row) for row in batch["taken"]]) | (drawn == own)
        scores = scores.masked_fill(F.pad(out, (1, 0)), -torch.inf)
    if kind == "softmax":
        return F.cross_entropy(scores, places[:, 0], reduction="none")
    others = scores.isfinite().scatter(1, places, False)
    margins = scores.gather(1, places) - scores.masked_fill(~others, 0.0)
    return -(F.logsigmoid(margins) * others).sum(1) / others.sum(1).clamp(min=1)


def answer(scores: Tensor, batch: Mapping[str, Tensor], k: int) -> Tensor:
    """(N, 1 + K): the item's rank among all items that its user has not taken, and the first `k` of them."""
    out = _taken(scores, batch)
    found = ranks(scores, batch["targets"][:, ITEM], out)
    best = scores.masked_fill(out, -torch.inf).topk(min(k, scores.shape[1]), dim=1).indices
    return torch.cat([found[:, None], best.float()], dim=1)


def _taken(scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(N, items) bool: what each user took while training."""
    taken = batch["taken"]
    out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return out.scatter(1, torch.where(taken < 0, scores.shape[1], taken), True)[:, :-1]
