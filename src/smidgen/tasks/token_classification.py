"""Token classification: a tag for each word, such as named entities or parts of speech.

The body is the pre-trained model as it is; the task adds a linear head on the first sub-word of each word:

    outputs = W h + c       W: (K, 2 D)   K = tags;   h: the middle and the last hidden state of that sub-word

Words that a maximal length cuts off get no tag, and count as wrong.  Entities are judged whole, see `spans.py`.

    loss = sum over words of w_row l(outputs, tag)      w_row: the column "weight", 1 on average of the training rows

Tags are not balanced by class, as the labels of rows may be: most words have the tag O because most are no entity, and
a loss in which every tag counts alike finds entities where there are none.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import require_one_of, require_whole
from ..core.errors import DataError, RecipeError
from ..data.conll import read_conll
from ..data.split import duplicate_groups
from ..data.table import Problem, Table
from .base import Asked, Batch, Encoding, Example, Examples, TaskModel
from .judging import seen_before
from .loading import Tokenizer, load_body, load_tokenizer, settle_length
from .registry import task
from .row_roles import ROW_ROLES, RowRoles, TaskWithRoles, apart
from .text.classifiers import TokenClassifier
from .text.rows import said_rows, some_of
from .text.spans import NO_TAG, SCHEMES, Scheme, Tags, understand_tags
from .text.word_columns import WordColumns, guess_word_columns
from .text.words import SubWords, split_words


@dataclass(frozen=True, kw_only=True)
class TokenClassificationSettings:
    """scheme: of entities; found where nobody says.   tag_names: in order, where the data has numbers for them.
    max_length: of a row, in sub-words.
    """

    scheme: Scheme | None = None
    tag_names: tuple[str, ...] | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_whole(self, "max_length", least=3)
        require_one_of(self, "scheme", SCHEMES)


@task("token_classification")
class TokenClassification(TaskWithRoles):
    """Token classification with a given tokenizer, columns and tags."""

    summary = "named entities, parts of speech and other tags of words"
    may_shorten = False
    Settings = TokenClassificationSettings
    roles = ("tokens", "tags", "document", *ROW_ROLES)
    probed = True
    smooths = True

    max_length: int  # 0 until it is settled

    def __init__(
        self, tokenizer: Tokenizer, columns: WordColumns, tags: Tags, max_length: int, metric: str | None = None
    ) -> None:
        self.tokenizer, self.columns, self.tags, self.max_length = tokenizer, columns, tags, max_length
        self.sub_words = SubWords(tokenizer)
        self.metrics = tags.metrics
        self.judge_by(metric)
        self.notes = []

    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        found = read_conll(where)
        return found if found[0] else super().read(where, settings)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train = tables["train"]
        beside = RowRoles.said(train, asked, ROW_ROLES)
        rest, said = apart(train, asked, ROW_ROLES)
        if {"group", "time"} & beside.columns.keys():  # they say how rows are split, and no document does
            if "document" in said:
                raise RecipeError("data.columns has a document beside a group or a time: leave out the document")
            rest.columns.pop("document", None)
        columns, reasons = guess_word_columns(rest, said, tag_names=settings.tag_names or ())
        asked.decide_columns(vars(columns), reasons)
        tags, why = understand_tags(columns.tag_rows(train) or [], settings.scheme)
        asked.plan.decide("scheme", settings.scheme, tags.scheme, why)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        made = cls(tokenizer, columns, tags, settings.max_length or 0, asked.metric)
        made.take_roles(beside, by_class=True)
        return made

    def check(self, table: Table) -> dict[int, str]:
        return self.beside.check(table) | self.columns.check(table, self.tags)

    def strata(self, table: Table) -> Sequence[Any] | None:
        return self.columns.rarest(table)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """What the column "group" says; else documents stay whole; where there are none, equal sentences together."""
        groups = self.beside.groups(table) or self.columns.documents(table)
        return duplicate_groups(self.columns.sentences(table)) if groups is None else groups

    def remarks(self, train: Table, test: Table) -> list[str]:
        return seen_before(self.columns.sentences(train), self.columns.sentences(test), "rows")

    def build(self, asked: Asked) -> TokenClassifier:
        torch.manual_seed(asked.seed)  # of the new head
        return TokenClassifier(load_body(asked.model, asked.dtype, asked.revision), len(self.tags.names))

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        self.beside = self.beside.learned(train)
        lengths = self.sub_words.lengths(self.columns.words(some_of(train, asked.seed)))
        self.max_length = settle_length(self.max_length or None, lengths, model.body, self.tokenizer, asked, whole=True)

    def encoding(self) -> Encoding:
        names = (self.columns.tokens, self.columns.tags)
        settings = {"max_length": self.max_length, "tags": self.tags.names, "tag_names": self.columns.tag_names}
        return replace(self.beside.encoding(names, settings), filler=NO_TAG)

    def encode(self, table: Table) -> Examples:
        tags = self.tags.numbers(self.columns.tag_rows(table), self.columns.words(table))
        examples = self.sub_words.examples(self.columns.words(table), tags, self.max_length)
        return replace(examples, weights=self.beside.weights(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return self.sub_words.batch(examples, indices)

    def feature_targets(self, batch: Batch) -> Tensor:
        return batch["targets"][batch["words"] >= 0]

    def feature_weights(self, batch: Batch) -> Tensor | None:
        """Of each word what its row counts."""
        return batch["weights"][(batch["words"] >= 0).nonzero()[:, 0]] if "weights" in batch else None

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        targets, weights = batch["targets"], batch.get("weights")
        if targets.ndim == 2:  # of rows; else the probe's lines
            targets, weights = self.feature_targets(dict(batch)), self.feature_weights(dict(batch))
        losses = F.cross_entropy(outputs.float(), targets, reduction="none", label_smoothing=self.label_smoothing)
        return (losses if weights is None else losses * weights).sum(), len(targets)

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        return self.sub_words.tags(outputs, batch, self.max_length)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        return self.tags.score(answers, targets)

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        return self.tags.counts(answers, targets).flatten(1)

    def value_of(self, sums: Tensor) -> Tensor:
        return self.tags.figures(sums.view(*sums.shape[:-1], -1, 3))[self.metric]

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """The usual tag; where there are entities, that is none, and would say nothing."""
        if self.tags.scheme != "plain":
            return None
        usual = int(torch.bincount(targets[targets != NO_TAG]).argmax())
        return "majority", torch.full((count, max(self.max_length, targets.shape[1])), usual)

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        return self.tags.contrasts(self.columns.words(table), targets, base, tuned)

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        """Words with their entities, which go from word "start" to the one before "end"; or with their tags."""
        rows = self.columns.words(table)
        return [{"tokens": words, **self.tags.shown(words, tags)} for words, tags in zip(rows, answers, strict=True)]

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "scheme": self.tags.scheme,
            "tags": list(self.tags.names),
            "metric": self.metric,
            "columns": asdict(self.columns),
            "max_length": self.max_length,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        columns = WordColumns.from_description(description["columns"])
        tags = Tags.from_description(description["scheme"], description["tags"])
        tokenizer = load_tokenizer(asked.model, asked.revision)
        return cls(tokenizer, columns, tags, int(description["max_length"]), description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        table = said_rows(self.columns.tokens, [split_words(text) for text in inputs])
        if empty := [table.where(i) for i, words in enumerate(self.columns.words(table)) if not words]:
            raise DataError(f"{', '.join(empty)}: no words")
        return table

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.columns = self.columns.fitting(table, labelled=labelled)
