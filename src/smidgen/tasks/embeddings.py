"""Embeddings: texts as vectors, near one another where the texts belong together; for search and comparison.

    z = pool(h) / |pool(h)|        h: last hidden states, pooled as the model was trained      similarity = z_1 z_2

Two shapes of data.  Pairs that belong together, such as a question and its answer, and perhaps a wrong answer: each
text is to find its own among those of the batch, and is judged by finding it among all.  Pairs with a score of their
similarity: the pairs are to be in the order of the scores, and are judged by rank correlation.

The negatives of a batch are those of one micro-batch: `accumulate` brings no more of them, a larger `batch` does, and
losses of batches of different size cannot be compared.

A column "weight" says what the loss of a row counts; a row of weight 0 still is a negative of others.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, cast, get_args

from torch import Tensor, nn

from ..core.checks import require_above_zero, require_one_of, require_whole
from ..core.errors import DataError
from ..data.table import Table
from .base import Asked, Batch, Encoding, Example, Examples, TaskModel
from .judging import counted
from .loading import Tokenizer, load_body, load_tokenizer, settle_length
from .registry import task
from .row_roles import ROW_ROLES, RowRoles, TaskWithRoles, apart
from .text.objectives import Loss, objective_for, shown
from .text.pair_columns import ROLES, SIDES, PairColumns, pair_columns, score_range
from .text.rows import said_rows, some_of
from .text.sentence_pooling import Embedder, Pooling, as_trained, save_trained
from .text.sides import Sides
from .text.similarity import connected


@dataclass(frozen=True, kw_only=True)
class EmbeddingsSettings:
    """How to learn and to embed; what is None is found in the data and in the model's folder.

    loss: contrastive for pairs that belong together; CoSENT, or the squared error of the cosine, for pairs with scores.
    temperature: of contrastive and CoSENT.   symmetric: contrastive finds the text of its pair as well.
    query_prompt, document_prompt: put before each text, each text_pair and negative: "query: ".
    """

    loss: Loss | None = None
    temperature: float = 0.05
    symmetric: bool = False
    pooling: Pooling | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "loss", get_args(Loss))
        require_one_of(self, "pooling", get_args(Pooling))
        require_above_zero(self, "temperature")
        require_whole(self, "max_length", least=2)


@task("embeddings")
class Embeddings(TaskWithRoles):
    """Embeddings with a given tokenizer, columns (role -> name) and settings, of which none is None.

    scores: the lowest and highest that a pair can have, which the squared error takes for cosines of 0 and 1.
    """

    summary = "vectors of texts, learned from pairs that belong together or have a score of similarity"
    Settings = EmbeddingsSettings
    roles = (*ROLES, *ROW_ROLES)
    split_words = "seeded, rows that share a text kept together"
    largest_batch = 64

    def __init__(
        self,
        tokenizer: Tokenizer,
        columns: Mapping[str, str],
        settings: EmbeddingsSettings,
        scores: tuple[float, float] = (0.0, 1.0),
        metric: str | None = None,
    ) -> None:
        self.tokenizer, self.columns, self.settings, self.scores = tokenizer, PairColumns(columns), settings, scores
        self.sides = Sides(tokenizer, settings.query_prompt or "", settings.document_prompt or "")
        self.max_length = settings.max_length
        self.finds = settings.loss == "contrastive"
        temperature, symmetric = settings.temperature, settings.symmetric
        loss = cast(Loss, settings.loss)
        self.objective = objective_for(loss, temperature=temperature, symmetric=symmetric, scores=scores)
        self.metrics = self.objective.metrics
        self.judge_by(metric)
        self.notes: list[str] = []
        self._is_judged = True

    # -- reading ----------------------------------------------------------------------------------------------------
    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        scored = None if settings.loss is None else settings.loss != "contrastive"
        beside = RowRoles.said(tables["train"], asked, ROW_ROLES)
        columns, reasons = pair_columns(*apart(tables["train"], asked, ROW_ROLES), scored=scored)
        asked.decide_columns(columns, reasons)
        found: Loss = "cosent" if "score" in columns else "contrastive"
        why = "the pairs have scores" if "score" in columns else "no scores are given"
        loss = asked.plan.decide("loss", settings.loss, found, why)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        prompts = {"query_prompt": settings.query_prompt, "document_prompt": settings.document_prompt}
        settings = replace(settings, loss=loss, **as_trained(asked, settings.pooling, prompts))
        scores = score_range(tables["train"].column(columns["score"])) if "score" in columns else (0.0, 1.0)
        made = cls(tokenizer, columns, settings, scores, asked.metric)
        made.take_roles(beside)
        if made.finds:
            made.notes.append("queries are ranked among the different documents of the rows that judge, and no others")
        return made

    def check(self, table: Table) -> dict[int, str]:
        return self.beside.check(table) | self.columns.check(table, differ=self.finds and self._is_judged)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """What the column "group" says; else rows that share a text, whichever side it is on, and rows that share one
        with those.
        """
        return self.beside.groups(table) or connected([row[:2] for row in self.columns.numbers(table).tolist()])

    def strata(self, table: Table) -> Sequence[Any] | None:
        return None if self.finds else self.columns.scores(table).tolist()

    def remarks(self, train: Table, test: Table) -> list[str]:
        return self.columns.remarks(train, test)

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> Embedder:
        return Embedder(load_body(asked.model, asked.dtype, asked.revision), self.settings.pooling or "mean")

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        self.beside = self.beside.learned(train)
        lengths = self.sides.lengths(self.columns, some_of(train, asked.seed))
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)

    # -- rows -------------------------------------------------------------------------------------------------------
    def encoding(self) -> Encoding:
        names = {role: self.columns.names[role] for role in ROLES if role in self.columns.names}
        settings = {
            "sides": [side for side in SIDES if side in names],
            "prompts": [self.settings.query_prompt, self.settings.document_prompt],
            "max_length": self.max_length,
            "finds": self.finds,
        }
        return self.beside.encoding([*names.values()], settings)

    def complete(self, table: Table, examples: Examples) -> Examples:
        return replace(examples, targets=self.columns.numbers(table)) if self.finds else examples

    def encode(self, table: Table) -> Examples:
        targets = self.objective.targets(self.columns, table)
        examples = self.sides.examples(self.columns, table, targets, self.max_length)
        return replace(examples, weights=self.beside.weights(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return self.sides.batch(examples, indices)

    # -- learning and judging ---------------------------------------------------------------------------------------
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return self.objective.loss(outputs, batch["targets"], batch.get("weights")), len(outputs)

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        return self.objective.kept(outputs)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        return self.objective.score(answers, targets)

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        values = self.objective.values(answers, targets)
        return None if values is None else counted(values[self.metric])

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        return self.objective.contrasts([*map(list, self.columns.texts(table).values())], targets, base, tuned)

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        settings = {**asdict(self.settings), "max_length": self.max_length}
        return {
            "task": self.name,
            "columns": dict(self.columns.names),
            "settings": settings,
            "scores": list(self.scores),
            "metric": self.metric,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        low, high = map(float, description["scores"])
        tokenizer = load_tokenizer(asked.model, asked.revision)
        columns = {str(role): str(name) for role, name in description["columns"].items()}
        settings = EmbeddingsSettings(**description["settings"])
        return cls(tokenizer, columns, settings, (low, high), description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        return said_rows(next(iter(self.columns.names.values())), inputs)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        """Where nothing is judged, one side of the pair is enough: its vectors are shown."""
        self._is_judged = labelled
        if not labelled:
            self.columns = PairColumns({side: self.columns.names[side] for side in self.columns.sides(table)})
        if not self.columns.sides(table):
            raise DataError(f"no column of texts: {', '.join(table.names)}")

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        return [row | found for row, found in zip(self.columns.rows(table), shown(answers), strict=True)]

    def save_body(self, body: nn.Module, folder: str) -> None:
        """So that sentence-transformers reads it too."""
        super().save_body(body, folder)
        prompts = {"query": self.sides.query_prompt, "document": self.sides.document_prompt}
        width = cast(Any, body).config.hidden_size
        save_trained(folder, self.settings.pooling or "mean", prompts, width=width, max_length=self.max_length)
