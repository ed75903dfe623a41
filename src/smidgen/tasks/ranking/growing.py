"""Tables that grow: new rows for new users and items, behind the old ones, which stay as they are to the last bit.

    E'(r) = E(r)  if r < V   else   N(r - V)          E: (V, D), frozen, adapters and all      N: (n, D), trained

The embedding stays in its place with its name, shape and weight; what is asked of it is split between it and N.
A new row starts as the weighted mean of the old rows most like it (its neighbours), as the mean of all, or as zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..base import Batch, TaskModel
from .recommenders import SIDES, Recommender, Rows, Side

WarmStart = Literal["neighbours", "mean", "zeros"]
_STARTS = {
    "neighbours": "the old rows most like them, by interactions and features",
    "mean": "the mean of the old rows",
    "zeros": "zeros",
}
_NEIGHBOURS = 20
_BLOCK = 64  # new rows at a time


class GrownRecommender(TaskModel):
    """A recommender whose tables have new rows behind their own, which are the head."""

    body: Recommender

    def __init__(self, body: Recommender, new: Mapping[Side, int], features: Mapping[Side, Tensor]) -> None:
        """new: how many rows.   features: theirs, (n, F)."""
        super().__init__()
        self.body = body
        self.grown = {path: side for path, side in body.tables.items() if new[side]}
        self.head, self.fixed = nn.Module(), nn.Module()  # fixed: features, which are neither trained nor saved
        for path, side in self.grown.items():
            table = cast(nn.Embedding, body.get_submodule(path))
            rows = nn.Embedding(new[side], table.embedding_dim)
            self.head.add_module(_plain(path), rows)
            Growth(table, rows)
        for path, side in body.features.items():
            if new[side]:
                features_of = Rows(features[side])
                self.fixed.add_module(_plain(path), features_of)
                Growth(body.get_submodule(path), features_of)
        self.items = len(body.known.items) + new["item"]

    def forward(self, batch: Batch) -> Tensor:
        """Scores of all items, (N, V + n); where some are "drawn" (C,), of each row's own and of these, (N, 1 + C)."""
        with torch.autocast(batch["users"].device.type, enabled=False):  # 16 bits tie items that differ
            return self._scores(batch)

    def _scores(self, batch: Batch) -> Tensor:
        users, history, drawn = batch["users"], batch["history"], batch.get("drawn")
        if drawn is None:
            scores: Tensor = self.body(users, history, torch.arange(self.items, device=users.device))
            return scores
        own = batch["targets"][:, 0]
        scores = self.body(users, history, torch.cat([own, drawn]))  # (N, N + C)
        return torch.cat([scores.diagonal()[:, None], scores[:, len(own) :]], dim=1)


class Growth:
    """What stands before and behind the call of a table.   rows: N, called with row numbers from 0."""

    def __init__(self, table: nn.Module, rows: Callable[[Tensor], Tensor]) -> None:
        self.old = len(table.weight)  # type: ignore[arg-type]
        self.rows, self.asked = rows, torch.zeros(0)
        table.register_forward_pre_hook(self.before)
        table.register_forward_hook(self.behind)

    def before(self, table: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.asked = args[0]
        return (args[0].clamp(max=self.old - 1), *args[1:])

    def behind(self, table: nn.Module, args: Any, output: Tensor) -> Tensor:
        new = self.asked - self.old
        return torch.where((new >= 0)[..., None], self.rows(new.clamp(min=0)).to(output.dtype), output)


@torch.no_grad()
def warm_start(
    model: GrownRecommender, how: WarmStart, pairs: Tensor, words: Mapping[Side, Sequence[Sequence[str]]]
) -> str:
    """Let the new rows begin where `how` says; returns that in words, and of how many no neighbour was found.

    pairs: (M, 2) rows of users and items, all that is known.   words: of each row its features; empty for none.
    """
    shape = (len(words["user"]), len(words["item"]))
    took = matrix_of(pairs, shape)
    why = f"of the new rows, from {_STARTS[how]}"
    for side in SIDES:
        paths = [path for path, grown in model.grown.items() if grown == side]
        weights = places = None
        if paths and how == "neighbours":
            seen_with = took if side == "user" else took.T.coalesce()
            weights, places = neighbours((seen_with, _features(words[side])), len(model.body.known.names(side)))
            if alone := int((weights.sum(1) == 0).sum()):
                why += f"; {alone} of {len(weights)} {side}s are like none, and start from the mean"
        for path in paths:
            old = cast(Tensor, model.body.get_submodule(path).weight)
            rows = cast(Tensor, model.head.get_submodule(_plain(path)).weight)
            if weights is not None and places is not None:
                rows.copy_(mean_of_neighbours(old, weights.to(old.device), places.to(old.device)))
            else:
                rows.copy_(old.mean(0) if how == "mean" else torch.zeros_like(old[0]))
    return why


def neighbours(views: Sequence[Tensor], old: int) -> tuple[Tensor, Tensor]:
    """The old rows most like each new one: how alike, (n, k), and which, (n, k).

    views: sparse matrices of 0 and 1, (V + n, C) for any C, rows alike in what they hold.   old: V.
    The likeness is the sum of their cosines.
    """
    found = []
    kept = [view.index_select(0, torch.arange(old)) for view in views]
    for start in range(old, views[0].shape[0], _BLOCK):
        block = torch.arange(start, min(start + _BLOCK, views[0].shape[0]))
        alike = torch.zeros(len(block), old)
        for view, rows in zip(views, kept, strict=True):
            new = view.index_select(0, block).to_dense()  # (block, C)
            sizes = new.sum(1)[:, None] * torch.sparse.sum(rows, 1).to_dense()[None]
            alike += torch.sparse.mm(rows, new.T).T / sizes.sqrt().clamp(min=1)
        found.append(alike.topk(min(_NEIGHBOURS, old), dim=1))
    return torch.cat([some.values for some in found]), torch.cat([some.indices for some in found])


def mean_of_neighbours(old: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """(n, D): the mean of the old rows (V, D) at `places`, by weight; of all old rows where all weights are 0."""
    total = weights.sum(1, keepdim=True)
    shares = weights / total.clamp(min=1e-9)
    rows = torch.stack([share @ old[place] for share, place in zip(shares, places, strict=True)])
    return torch.where(total > 0, rows, old.mean(0))


def matrix_of(pairs: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pairs (M, 2) as a sparse matrix of 0 and 1."""
    pairs = torch.unique(pairs, dim=0)
    return torch.sparse_coo_tensor(pairs.T, torch.ones(len(pairs)), shape, check_invariants=True).coalesce()


def _features(words: Sequence[Sequence[str]]) -> Tensor:
    place = {word: i for i, word in enumerate(sorted({word for some in words for word in some}))}
    pairs = [(i, place[word]) for i, some in enumerate(words) for word in some]
    return matrix_of(torch.tensor(pairs, dtype=torch.int64).view(-1, 2), (len(words), max(1, len(place))))


def _plain(path: str) -> str:
    """A path as the name of one module."""
    return path.replace(".", "/")
