"""Recommendation: which item a user takes next, for users and items that the base model may never have seen.

The body is a recommender (ranking/recommenders.py); the head is the new rows of its tables (ranking/growing.py).  New
users and items are those of the training table that the base does not know; old rows stay as they are.

    softmax    L = - log exp s(u, i) / sum_j exp s(u, j)          j: i and all items that u has not taken, or some drawn
    bpr        L = - mean_j log sigmoid(s(u, i) - s(u, j))        Rendle et al. 2009, arXiv:1205.2618

What u took before is not among the j: the base has learned to rank it high, and would only unlearn its taste.
Judged by the rank of the item among all items that the user has not taken while training; no candidate is sampled.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_finite, require_one_of, require_whole
from ..core.errors import DataError
from ..data.interactions import (
    ROLES,
    Histories,
    at_random,
    check_interaction,
    identity,
    interaction_columns,
    latest,
    leave_one_out,
    read_features,
)
from ..data.read import read
from ..data.table import Table
from ..data.values import number
from .base import Asked, Batch, Example, Examples, Task, TaskModel
from .ranking.growing import GrownRecommender, WarmStart, warm_start
from .ranking.ranks import mrr_at, ndcg_at, ranks, recall_at
from .ranking.recommenders import SIDES, Known, Recommender, Side, load_recommender, write_recommender
from .registry import task

_ALL = 20_000  # items, up to which all are scored in a step
_DRAWN = 1000  # of more items
_HEAD = 0.2  # the share of items, by popularity, that is called the head
_KEPT = 200_000  # interactions, the newest, that are written into a result
# the numbers of a target: row of the item; 1 if the interaction counts; kind of item (0 head, 1 tail, 2 new) and of
# user (0 many interactions, 1 few); twice the rank that popularity alone would give
_ITEM, _COUNTS, _ITEM_KIND, _USER_KIND, _POPULARITY = range(5)
_SOME = {"head": (_ITEM_KIND, 0), "tail": (_ITEM_KIND, 1), "new": (_ITEM_KIND, 2)} | {
    "many": (_USER_KIND, 0),
    "few": (_USER_KIND, 1),
}
_STARTS = {
    "neighbours": "the old rows most like them, by interactions and features",
    "mean": "the mean of the old rows",
    "zeros": "zeros",
}
_METRICS = {"ndcg": ndcg_at, "recall": recall_at, "mrr": mrr_at}


@dataclass(frozen=True, kw_only=True)
class RecommendationSettings:
    """split: how rows to judge by are held out: each user's last, the latest of all, or any.   k: places that count.

    warm_start: where new rows begin.   users, items: files of features, the id in their first column.
    loss, negatives: see above; negatives is how many items are drawn for a step, where not all are scored.
    least_rating: a lower one is known but neither learned nor judged.   few: a user with fewer interactions is cold.
    """

    split: Literal["leave_one_out", "time", "random"] | None = None
    warm_start: WarmStart = "neighbours"
    users: str | None = None
    items: str | None = None
    loss: Literal["softmax", "bpr"] = "softmax"
    negatives: int | None = None
    least_rating: float | None = None
    history: int = 50
    few: int = 10
    k: int = 10

    def __post_init__(self) -> None:
        require_whole(self, "negatives", "history", "few", "k")
        require_finite(self, "least_rating")
        require_one_of(self, "split", ("leave_one_out", "time", "random"))
        require_one_of(self, "warm_start", ("neighbours", "mean", "zeros"))
        require_one_of(self, "loss", ("softmax", "bpr"))


@task("recommendation")
class Recommendation(Task):
    """Recommendation by a given recommender to its users and items, and to new ones."""

    summary = "which item a user takes next; tables that grow by new users and items"
    Settings = RecommendationSettings
    roles = ROLES
    unit = "interactions"
    split_words = "by task.split"
    largest_batch = 256

    def __init__(
        self,
        known: Known,
        new: Mapping[Side, Sequence[str]],
        features: Mapping[Side, Sequence[Sequence[int]]],
        columns: Mapping[str, str],
        settings: RecommendationSettings,
        metric: str | None = None,
    ) -> None:
        """new: names of the rows behind the base's.   features: of each of these, the columns that are 1."""
        self.known, self.new, self.columns, self.settings = known, {s: list(new[s]) for s in SIDES}, columns, settings
        self.features = {side: [list(some) for some in features[side]] for side in SIDES}
        self.names = {side: [*known.names(side), *new[side]] for side in SIDES}
        self.rows = {side: {name: i for i, name in enumerate(self.names[side])} for side in SIDES}
        if any(len(self.rows[side]) < len(self.names[side]) for side in SIDES):
            raise ValueError("a new user or item is named twice, or is not new")
        k = settings.k
        self.metrics = (*(f"{name}@{k}" for name in _METRICS), *(f"ndcg@{k}_{some}" for some in _SOME))
        self.judge_by(metric)
        self.notes: list[str] = []
        self.taken_while_training([], [], [])

    def taken_while_training(self, users: Sequence[int], items: Sequence[int], times: Sequence[float]) -> None:
        """Take what was learned from: it is the users' history, and is not recommended again."""
        before = self.known.interactions
        old_users, old_items = before[:, 0].tolist(), before[:, 1].tolist()
        self.trained = sorted(zip(times, users, items, strict=True))
        self.histories = Histories([*old_users, *users], [*old_items, *items], [*[-math.inf] * len(before), *times])
        counts = torch.bincount(torch.tensor([*old_items, *items], dtype=torch.int64), minlength=len(self.rows["item"]))
        self.counts = counts
        kinds = torch.ones(len(counts), dtype=torch.int64)
        kinds[counts.argsort(descending=True, stable=True)[: math.ceil(_HEAD * len(counts))]] = 0
        kinds[len(self.known.items) :] = 2
        self.kinds = kinds

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train = tables["train"]
        columns, reasons = interaction_columns(train, asked.columns)
        for role, why in reasons.items():
            asked.plan.decide(f"{role} column", None, columns[role], why)
        known = load_recommender(asked.model).known
        new: dict[Side, list[str]] = {}
        words: dict[Side, dict[str, list[str]]] = {}
        for side in SIDES:
            old, found = set(known.names(side)), dict.fromkeys(map(identity, train.column(columns[side])))
            new[side] = [name for name in found if name and name not in old]
            file = getattr(settings, f"{side}s")
            words[side] = read_features(read(file)[0]) if file else {}
            why = f"{len(found) - len(new[side]):,} of {len(found):,} in training are among the base's {len(old):,}"
            asked.plan.decide(f"new {side}s", None, f"{len(new[side]):,}", why)
        features = {side: _columns_of(new[side], words[side], known.feature_names(side)) for side in SIDES}
        made = cls(known, new, features, columns, settings, asked.metric)
        made._words = words
        ordered = "time" in columns
        why = "each user's last interaction judges" if ordered else "there is no time to split by"
        made.split = asked.plan.decide("split", settings.split, "leave_one_out" if ordered else "random", why)
        if made.split != "random" and not ordered:
            raise DataError(f"task.split is {made.split} and no column says the time: --column time=NAME")
        return made

    split: str = "leave_one_out"
    negatives: int | None = None
    _words: Mapping[Side, Mapping[str, list[str]]] = {}  # of the files of features
    _train: Table | None = None
    _start: Mapping[str, Tensor] = {}  # the new rows, before any training

    # -- rows -------------------------------------------------------------------------------------------------------
    def check(self, table: Table) -> dict[int, str]:
        there = {role: name for role, name in self.columns.items() if name in table.columns}
        problems: dict[int, str] = {}
        for i in range(len(table)):
            row = {role: table.column(name)[i] for role, name in there.items()}
            what = check_interaction(row)
            for side in SIDES:
                if what is None and side in row and identity(row[side]) not in self.rows[side]:
                    what = f'{side} "{row[side]}" is known neither to the base nor to the training rows'
            if what:
                problems[i] = what
        return problems

    def hold_out(self, table: Table, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        if self.split == "random":
            return at_random(len(table), fraction, seed)
        times = [float(number(value) or 0) for value in table.column(self.columns["time"])]
        if self.split == "time":
            return latest(times, fraction)
        return leave_one_out([identity(value) for value in table.column(self.columns["user"])], times)

    def encode(self, table: Table) -> Examples:
        users, items, times = self._rows(table, "user"), self._rows(table, "item"), self._times(table)
        inputs = [{"user": u, "before": self.histories.count_before(u, t)} for u, t in zip(users, times, strict=True)]
        counts = [True] * len(table)
        if self.settings.least_rating is not None and self.columns.get("rating") in table.columns:
            ratings = [number(value) for value in table.column(self.columns["rating"])]
            counts = [rating is not None and rating >= self.settings.least_rating for rating in ratings]
        targets = torch.zeros(len(table), 5, dtype=torch.int64)
        targets[:, _ITEM] = torch.tensor(items)
        targets[:, _COUNTS] = torch.tensor(counts)
        targets[:, _ITEM_KIND] = self.kinds[targets[:, _ITEM]]
        targets[:, _USER_KIND] = torch.tensor([len(self.histories.items(u)) < self.settings.few for u in users])
        targets[:, _POPULARITY] = torch.tensor(self._by_popularity(users, items))
        return Examples(inputs, targets, [1] * len(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        some = [examples.inputs[i] for i in indices]
        taken = [self.histories.items(row["user"]) for row in some]
        history = [
            row[max(0, x["before"] - self.settings.history) : x["before"]] for row, x in zip(taken, some, strict=True)
        ]
        return {
            "users": torch.tensor([row["user"] for row in some]),
            "history": _padded(history, at_end=False),
            "taken": _padded(taken, at_end=True),
            "targets": examples.targets[list(indices)],
        }

    def augment(self, batch: Batch) -> Batch:
        if self.negatives is None:
            return batch
        count = len(self.rows["item"])
        return {**batch, "drawn": torch.randint(count, (self.negatives,), device=batch["users"].device)}

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> "GrownRecommender":
        model = GrownRecommender(load_recommender(asked.model), {s: len(self.new[s]) for s in SIDES}, self._values())
        if self._start:
            model.head.load_state_dict(self._start)
        return model

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        assert isinstance(model, GrownRecommender)
        count, said, self._train = len(self.rows["item"]), self.settings.warm_start, train
        chosen, why = (None, f"all {count:,} items are scored") if count <= _ALL else (_DRAWN, "there are many items")
        self.negatives = asked.plan.decide("negatives", self.settings.negatives, chosen, why)
        self.taken_while_training(self._rows(train, "user"), self._rows(train, "item"), self._times(train))
        pairs = torch.tensor([*self.known.interactions.tolist(), *([u, i] for _, u, i in self.trained)])
        words = {side: [self._words[side].get(name, []) for name in self.names[side]] for side in SIDES}
        alone = warm_start(model, said, pairs, words)
        rest = "".join(
            f"; {count} of {len(self.new[side])} {side}s are like none, and start from the mean"
            for side, count in alone.items()
            if count
        )
        if model.grown:
            asked.plan.decide("warm start", None, said, f"of the new rows, from {_STARTS[said]}{rest}")
        self._start = {name: value.detach().clone() for name, value in model.head.state_dict().items()}

    # -- learning and judging ---------------------------------------------------------------------------------------
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        scores, targets = outputs.float(), batch["targets"]
        own, drawn = targets[:, _ITEM, None], batch.get("drawn")
        if drawn is None:
            places = own
            scores = scores.masked_fill(_taken(scores, batch).scatter(1, own, False), -torch.inf)
        else:
            places = torch.zeros_like(own)
            out = torch.stack([torch.isin(drawn, row) for row in batch["taken"]]) | (drawn == own)
            scores = scores.masked_fill(F.pad(out, (1, 0)), -torch.inf)
        if self.settings.loss == "softmax":
            losses = F.cross_entropy(scores, places[:, 0], reduction="none")
        else:
            others = scores.isfinite().scatter(1, places, False)
            margins = scores.gather(1, places) - scores.masked_fill(~others, 0.0)
            losses = -(F.logsigmoid(margins) * others).sum(1) / others.sum(1).clamp(min=1)
        weights = targets[:, _COUNTS]
        return (losses * weights).sum(), int(weights.sum())

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """(N, 1 + K): the item's rank, and the rows of the items ranked first among those not taken."""
        scores = outputs.float()
        out = _taken(scores, batch)
        found = ranks(scores, batch["targets"][:, _ITEM], out)
        best = scores.masked_fill(out, -torch.inf).topk(min(self.settings.k, scores.shape[1]), dim=1).indices
        return torch.cat([found[:, None], best.float()], dim=1)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        means = {}
        for metric in self.metrics:
            values = self._values_of(metric, answers, targets)
            if metric == self.metric or float(values[:, 1].sum()):
                means[metric] = float(self.value_of(values.sum(0)))
        return means

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor:
        return self._values_of(self.metric, answers, targets)

    def value_of(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]

    def _values_of(self, metric: str, answers: Tensor, targets: Tensor) -> Tensor:
        """Per row the value of a metric, and 1 if the row is one of those it is about; (N, 2)."""
        name, _, some = metric.partition(f"@{self.settings.k}")
        place = torch.where(answers[:, 0] > 0, answers[:, 0], targets[:, _POPULARITY] / 2)
        about = targets[:, _COUNTS] == 1
        if some:
            column, kind = _SOME[some[1:]]
            about = about & (targets[:, column] == kind)
        return torch.stack([_METRICS[name](place, self.settings.k) * about, about.float()], dim=1)

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """Rank 0: that of popularity, which is with the targets."""
        return "popularity", torch.zeros(count, 1 + min(self.settings.k, len(self.rows["item"])))

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        found, k = list[Example](), self.settings.k
        users, names = table.column(self.columns["user"]), self.names["item"]
        for i in ((base[:, 0] <= k) != (tuned[:, 0] <= k)).nonzero()[:, 0].tolist():
            said = [f"{names[int(line[1])]} first; the right one on place {line[0]:g}" for line in (base[i], tuned[i])]
            truth = names[int(targets[i, _ITEM])]
            better: Literal["base", "tuned"] = "tuned" if tuned[i, 0] <= k else "base"
            found.append(Example(text=f"user {users[i]}", truth=truth, base=said[0], tuned=said[1], better=better))
        return found

    def remarks(self, train: Table, test: Table) -> list[str]:
        there = set(map(tuple, self.known.interactions.tolist())) | set(self._pairs(train))
        again = sum(pair in there for pair in self._pairs(test))
        if not again:
            return []
        return [f"{again} of {len(test)} test interactions were there while training too: that flatters the figures"]

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        taken = defaultdict[int, list[int]](list)
        for _, user, item in self.trained[-_KEPT:]:
            taken[user].append(item)
        settings = {name: getattr(self.settings, name) for name in ("loss", "least_rating", "history", "few", "k")}
        return {
            "task": self.name,
            "metric": self.metric,
            "columns": dict(self.columns),
            "settings": settings,
            "new": self.new,
            # words of numbers: a line each in the file, and not one for each number
            "features": {side: [" ".join(map(str, some)) for some in self.features[side]] for side in SIDES},
            "taken": {str(user): " ".join(map(str, items)) for user, items in taken.items()},
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        known, settings = load_recommender(asked.model).known, RecommendationSettings(**description["settings"])
        new = {side: [str(name) for name in description["new"][side]] for side in SIDES}
        features = {side: [[*map(int, str(some).split())] for some in description["features"][side]] for side in SIDES}
        made = cls(known, new, features, dict(description["columns"]), settings, description["metric"])
        pairs = [
            (int(user), int(item)) for user, some in dict(description["taken"]).items() for item in str(some).split()
        ]
        users, items = [user for user, _ in pairs], [item for _, item in pairs]
        sides: tuple[tuple[list[int], Side], ...] = ((users, "user"), (items, "item"))
        for rows, side in sides:
            if rows and not 0 <= min(rows) <= max(rows) < len(made.rows[side]):
                raise ValueError(f"an interaction is with {side} {max(rows)} of {len(made.rows[side])}")
        made.taken_while_training(users, items, [float(i) for i in range(len(users))])
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        return Table({self.columns["user"]: list(inputs)}, [f"--text {i + 1}" for i in range(len(inputs))])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        if not labelled:
            self.columns = {role: name for role, name in self.columns.items() if role == "user"}
        if self.columns["user"] not in table.columns or (labelled and self.columns.get("item") not in table.columns):
            self.columns, _ = interaction_columns(table, {})

    def save_body(self, body: nn.Module, folder: str) -> None:
        if not isinstance(body, Recommender):
            super().save_body(body, folder)
        write_recommender(cast(Recommender, body), Path(folder))

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        names = self.names["item"]
        users = table.column(self.columns["user"])
        return [
            {"user": str(user), "items": [names[int(item)] for item in line[1:]]}
            for user, line in zip(users, answers.tolist(), strict=True)
        ]

    # -- helpers ----------------------------------------------------------------------------------------------------
    def _pairs(self, table: Table) -> list[tuple[int, int]]:
        return list(zip(self._rows(table, "user"), self._rows(table, "item"), strict=True))

    def _rows(self, table: Table, side: Side) -> list[int]:
        """The rows of the table's users or items; zeros where there are no items, for predicting."""
        name = self.columns.get(side)
        if name is None or (side == "item" and name not in table.columns):
            return [0] * len(table)
        return [self.rows[side][identity(value)] for value in table.column(name)]

    def _times(self, table: Table) -> list[float]:
        """When each row was; without a column, training rows in their order and all others later."""
        name = self.columns.get("time")
        if name is not None and name in table.columns:
            return [float(number(value) or 0) for value in table.column(name)]
        return [float(i) if table is self._train else math.inf for i in range(len(table))]

    def _by_popularity(self, users: Sequence[int], items: Sequence[int]) -> list[int]:
        """Twice the rank of each item for its user, if all were recommended what is taken most."""
        ordered, own = self.counts.sort().values, self.counts[list(items)]
        above = (len(ordered) - torch.searchsorted(ordered, own, right=True)).tolist()
        equal = (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own) - 1).tolist()
        counts, found = self.counts.tolist(), []
        for i, (user, item) in enumerate(zip(users, items, strict=True)):
            taken = [counts[other] for other in set(self.histories.items(user)) - {item}]
            higher = above[i] - sum(count > counts[item] for count in taken)
            found.append(2 + 2 * higher + equal[i] - sum(count == counts[item] for count in taken))
        return found

    def _values(self) -> dict[Side, Tensor]:
        """The features of the new rows, (n, F) 0 or 1."""
        values: dict[Side, Tensor] = {}
        for side in SIDES:
            values[side] = torch.zeros(len(self.new[side]), len(self.known.feature_names(side)))
            for i, some in enumerate(self.features[side]):
                values[side][i, some] = 1.0
        return values


def _columns_of(names: Sequence[str], words: Mapping[str, list[str]], known: Sequence[str]) -> list[list[int]]:
    """Of each name, which of the base's features it has."""
    place = {word: i for i, word in enumerate(known)}
    return [sorted({place[word] for word in words.get(name, []) if word in place}) for name in names]


def _taken(scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(N, items) bool: what each user took while training."""
    taken = batch["taken"]
    out = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return out.scatter(1, torch.where(taken < 0, scores.shape[1], taken), True)[:, :-1]


def _padded(rows: Sequence[Sequence[int]], *, at_end: bool) -> Tensor:
    """Rows of different lengths as one (N, longest), -1 where there is nothing."""
    longest = max(map(len, rows), default=0)
    filled = [[*row, *[-1] * (longest - len(row))] if at_end else [*[-1] * (longest - len(row)), *row] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), longest)
