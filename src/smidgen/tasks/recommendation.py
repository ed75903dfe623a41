"""Recommendation: which item a user takes next, for users and items that the base model may never have seen.

The body is a recommender (ranking/recommenders.py); the head is the new rows of its tables (ranking/growing.py).  New
users and items are those of the training table that the base does not know; old rows stay as they are.

Judged by the rank of the item among all items that the user has not taken while training; no candidate is sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from ..core.checks import require_finite, require_one_of, require_whole
from ..data.interactions import ROLES, identity, interaction_columns, read_features
from ..data.read import read
from ..data.table import Table
from .base import Asked, Batch, Example, Examples, Task, TaskModel
from .judging import seen_before
from .ranking.catalogue import Catalogue, Words
from .ranking.figures import COUNTS, answer, contrasts, drawn_of, losses, metrics_at, values_of
from .ranking.growing import GrownRecommender, WarmStart, warm_start
from .ranking.interaction_rows import InteractionRows, Split
from .ranking.recommenders import SIDES, Recommender, Side, load_recommender, write_recommender
from .ranking.taken import Taken
from .registry import task
from .text.rows import said_rows


@dataclass(frozen=True, kw_only=True)
class RecommendationSettings:
    """split: how rows to judge by are held out: each user's last, the latest of all, or any.   k: places that count.

    warm_start: where new rows begin.   users, items: files of features, the id in their first column.
    loss: ranking/figures.py.   negatives: how many items are drawn for a step, where not all are scored.
    least_rating: a lower one is known but neither learned nor judged.   few: a user with fewer interactions is cold.
    """

    split: Split | None = None
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
        require_one_of(self, "split", get_args(Split))
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
        self.catalogue, self.columns, self.settings = catalogue, InteractionRows(columns), settings
        self.taken = Taken(catalogue, [], [])
        self.metrics = metrics_at(settings.k)
        self.judge_by(metric)
        self.notes: list[str] = []

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train = tables["train"]
        columns, reasons = interaction_columns(train, asked.columns)
        asked.decide_columns(columns, reasons)
        files = {"user": settings.users, "item": settings.items}
        words: Words = {side: read_features(read(files[side])[0]) if files[side] else {} for side in SIDES}
        found: dict[Side, list[str]] = {side: [*map(identity, train.column(columns[side]))] for side in SIDES}
        catalogue = Catalogue.grown(load_recommender(asked.model).known, found, words)
        for side in SIDES:
            asked.plan.decide(f"new {side}s", None, *catalogue.what_is_new(side, found[side]))
        made = cls(catalogue, columns, settings, asked.metric)
        made.columns = made.columns.learned(train)
        made.split = made.columns.choose_split(settings.split, asked)
        return made

    split: Split = "leave_one_out"
    negatives: int | None = None
    _train: Table | None = None
    _start: Mapping[str, Tensor] = {}  # the new rows, before any training

    # -- rows -------------------------------------------------------------------------------------------------------
    def check(self, table: Table) -> dict[int, str]:
        return self.columns.check(table, self.catalogue)

    def hold_out(self, table: Table, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        return self.columns.split(table, self.split, fraction, seed)

    def encode(self, table: Table) -> Examples:
        times = self.columns.times(table, in_order=table is self._train)
        counts = self.columns.counts(table, self.settings.least_rating)
        return self.taken.examples(self.columns.pairs(table, self.catalogue), times, counts, self.settings.few)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return self.taken.batch(examples, indices, self.settings.history)

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
        self.negatives = asked.plan.decide("negatives", self.settings.negatives, *drawn_of(count))
        pairs, times = self.columns.pairs(train, self.catalogue), self.columns.times(train, in_order=True)
        self.taken = Taken(self.catalogue, pairs, times)
        why = warm_start(model, said, self.taken.pairs(), self.catalogue.words)
        if model.grown:
            asked.plan.decide("warm start", None, said, why)
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
        users, items = table.column(self.columns.names["user"]), self.catalogue.names["item"]
        return contrasts(users, items, targets, base, tuned, self.settings.k)

    def remarks(self, train: Table, test: Table) -> list[str]:
        known = map(tuple, self.catalogue.known.interactions.tolist())
        learned, judged = (self.columns.pairs(table, self.catalogue) for table in (train, test))
        return seen_before([*known, *learned], judged, "interactions")

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        names = ("loss", "least_rating", "history", "few", "k")
        return {
            "task": self.name,
            "metric": self.metric,
            "columns": dict(self.columns.names),
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
        return said_rows(self.columns.names["user"], inputs)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.columns = self.columns.fitting(table, labelled=labelled)

    def save_body(self, body: nn.Module, folder: str) -> None:
        if not isinstance(body, Recommender):
            super().save_body(body, folder)
        write_recommender(cast(Recommender, body), Path(folder))

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        users, names = table.column(self.columns.names["user"]), self.catalogue.names["item"]
        return [
            {"user": str(user), "items": [names[int(item)] for item in line[1:]]}
            for user, line in zip(users, answers.tolist(), strict=True)
        ]
