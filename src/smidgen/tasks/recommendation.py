"""Recommendation: which item a user takes next, for users and items that the base model may never have seen.

The body is a recommender (ranking/recommenders.py); the head is the new rows of its tables (ranking/growing.py).  New
users and items are those of the training table that the base does not know; old rows stay as they are.

Judged by the rank of the item among all items that the user has not taken while training; no candidate is sampled.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from ..core.checks import require_finite, require_one_of, require_whole
from ..core.errors import DataError
from ..data.interactions import (
    ROLES,
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
from .judging import contrasted, seen_before
from .ranking.catalogue import Catalogue, Words
from .ranking.figures import COUNTS, ITEM, answer, losses, metrics_at, padded_rows, values_of
from .ranking.growing import GrownRecommender, WarmStart, warm_start
from .ranking.recommenders import SIDES, Recommender, Side, load_recommender, write_recommender
from .ranking.taken import Taken
from .registry import task
from .text.rows import said_rows

_ALL = 20_000  # items, up to which all are scored in a step
_DRAWN = 1000  # of more items
_STARTS = {
    "neighbours": "the old rows most like them, by interactions and features",
    "mean": "the mean of the old rows",
    "zeros": "zeros",
}


@dataclass(frozen=True, kw_only=True)
class RecommendationSettings:
    """split: how rows to judge by are held out: each user's last, the latest of all, or any.   k: places that count.

    warm_start: where new rows begin.   users, items: files of features, the id in their first column.
    loss: ranking/figures.py.   negatives: how many items are drawn for a step, where not all are scored.
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
        catalogue: Catalogue,
        columns: Mapping[str, str],
        settings: RecommendationSettings,
        metric: str | None = None,
    ) -> None:
        self.catalogue, self.columns, self.settings = catalogue, columns, settings
        self.taken = Taken(catalogue, [], [], [])
        self.metrics = metrics_at(settings.k)
        self.judge_by(metric)
        self.notes: list[str] = []

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train = tables["train"]
        columns, reasons = interaction_columns(train, asked.columns)
        asked.decide_columns(columns, reasons)
        known, files = load_recommender(asked.model).known, {"user": settings.users, "item": settings.items}
        words: Words = {side: read_features(read(files[side])[0]) if files[side] else {} for side in SIDES}
        found: dict[Side, list[str]] = {side: [*map(identity, train.column(columns[side]))] for side in SIDES}
        catalogue = Catalogue.grown(known, found, words)
        for side in SIDES:
            new, there, old = len(catalogue.new[side]), len(set(found[side])), len(known.names(side))
            why = f"{there - new:,} of {there:,} in training are among the base's {old:,}"
            asked.plan.decide(f"new {side}s", None, f"{new:,}", why)
        made = cls(catalogue, columns, settings, asked.metric)
        made._words = words
        ordered = "time" in columns
        why = "each user's last interaction judges" if ordered else "there is no time to split by"
        made.split = asked.plan.decide("split", settings.split, "leave_one_out" if ordered else "random", why)
        if made.split != "random" and not ordered:
            raise DataError(f"task.split is {made.split} and no column says the time: --column time=NAME")
        return made

    split: str = "leave_one_out"
    negatives: int | None = None
    _words: Words = MappingProxyType({})  # of the files of features
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
                if what is None and side in row and identity(row[side]) not in self.catalogue.rows[side]:
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
        histories, few = self.taken.histories, self.settings.few
        inputs = [{"user": u, "before": histories.count_before(u, t)} for u, t in zip(users, times, strict=True)]
        counts = [True] * len(table)
        if self.settings.least_rating is not None and self.columns.get("rating") in table.columns:
            ratings = [number(value) for value in table.column(self.columns["rating"])]
            counts = [rating is not None and rating >= self.settings.least_rating for rating in ratings]
        kinds, rare = self.taken.kinds[items].tolist(), [len(histories.items(user)) < few for user in users]
        targets = torch.tensor([items, counts, kinds, rare, self.taken.by_popularity(users, items)]).T
        return Examples(inputs, targets, [1] * len(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        some = [examples.inputs[i] for i in indices]
        taken = [self.taken.histories.items(row["user"]) for row in some]
        history = [
            row[max(0, x["before"] - self.settings.history) : x["before"]] for row, x in zip(taken, some, strict=True)
        ]
        return {
            "users": torch.tensor([row["user"] for row in some]),
            "history": padded_rows(history, at_end=False),
            "taken": padded_rows(taken, at_end=True),
            "targets": examples.targets[list(indices)],
        }

    def augment(self, batch: Batch) -> Batch:
        if self.negatives is None:
            return batch
        count = len(self.catalogue.rows["item"])
        return {**batch, "drawn": torch.randint(count, (self.negatives,), device=batch["users"].device)}

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> GrownRecommender:
        new = {side: len(self.catalogue.new[side]) for side in SIDES}
        model = GrownRecommender(load_recommender(asked.model), new, self.catalogue.values())
        if self._start:
            model.head.load_state_dict(self._start)
        return model

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        assert isinstance(model, GrownRecommender)
        count, said, self._train = len(self.catalogue.rows["item"]), self.settings.warm_start, train
        chosen, why = (None, f"all {count:,} items are scored") if count <= _ALL else (_DRAWN, "there are many items")
        self.negatives = asked.plan.decide("negatives", self.settings.negatives, chosen, why)
        users, items = self._rows(train, "user"), self._rows(train, "item")
        self.taken = Taken(self.catalogue, users, items, self._times(train))
        words = {side: [self._words[side].get(name, []) for name in self.catalogue.names[side]] for side in SIDES}
        alone = warm_start(model, said, self.taken.pairs(), words)
        rest = "".join(
            f"; {count} of {len(self.catalogue.new[side])} {side}s are like none, and start from the mean"
            for side, count in alone.items()
            if count
        )
        if model.grown:
            asked.plan.decide("warm start", None, said, f"of the new rows, from {_STARTS[said]}{rest}")
        self._start = {name: value.detach().clone() for name, value in model.head.state_dict().items()}

    # -- learning and judging ---------------------------------------------------------------------------------------
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        weights = batch["targets"][:, COUNTS]
        return (losses(self.settings.loss, outputs.float(), batch) * weights).sum(), int(weights.sum())

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        return answer(outputs.float(), batch, self.settings.k)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        sums = {metric: values_of(metric, answers, targets).sum(0) for metric in self.metrics}
        return {name: float(self.value_of(both)) for name, both in sums.items() if name == self.metric or both[1] > 0}

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor:
        return values_of(self.metric, answers, targets)

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """Rank 0: that of popularity, which is with the targets."""
        return "popularity", torch.zeros(count, 1 + min(self.settings.k, len(self.catalogue.rows["item"])))

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        users, names, k = table.column(self.columns["user"]), self.catalogue.names["item"], self.settings.k

        def words(i: int) -> tuple[str, str, str, str]:
            by_base, by_tuned = (
                f"{names[int(line[1])]} first; the right one on place {line[0]:g}" for line in (base[i], tuned[i])
            )
            return f"user {users[i]}", names[int(targets[i, ITEM])], by_base, by_tuned

        return contrasted(base[:, 0] <= k, tuned[:, 0] <= k, words)

    def remarks(self, train: Table, test: Table) -> list[str]:
        known = map(tuple, self.catalogue.known.interactions.tolist())
        return seen_before([*known, *self._pairs(train)], self._pairs(test), "interactions")

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        names = ("loss", "least_rating", "history", "few", "k")
        return {
            "task": self.name,
            "metric": self.metric,
            "columns": dict(self.columns),
            "settings": {name: getattr(self.settings, name) for name in names},
            **self.catalogue.describe(),
            "taken": self.taken.describe(),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        catalogue = Catalogue.from_description(load_recommender(asked.model).known, description)
        settings = RecommendationSettings(**description["settings"])
        made = cls(catalogue, dict(description["columns"]), settings, description["metric"])
        made.taken = Taken.from_description(catalogue, description["taken"])
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        return said_rows(self.columns["user"], inputs)

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
        users, names = table.column(self.columns["user"]), self.catalogue.names["item"]
        return [
            {"user": str(user), "items": [names[int(item)] for item in line[1:]]}
            for user, line in zip(users, answers.tolist(), strict=True)
        ]

    # -- helpers ----------------------------------------------------------------------------------------------------
    def _pairs(self, table: Table) -> list[tuple[int, int]]:
        return list(zip(self._rows(table, "user"), self._rows(table, "item"), strict=True))

    def _rows(self, table: Table, side: Side) -> list[int]:
        return self.catalogue.rows_in(table, self.columns.get(side), side)

    def _times(self, table: Table) -> list[float]:
        """When each row was; without a column, training rows in their order and all others later."""
        name = self.columns.get("time")
        if name is not None and name in table.columns:
            return [float(number(value) or 0) for value in table.column(name)]
        return [float(i) if table is self._train else math.inf for i in range(len(table))]
