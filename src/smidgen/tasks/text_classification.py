"""Text classification: one of several classes, several at once, or a number; for single texts and pairs.

The body is the pre-trained model as it is; the task adds a pooling and a linear head:

    z = mean over the tokens of h_t         encoders;     the last token's h in decoders, which look backwards
    outputs = W z + c                       W: (K, 2 D)   K = classes, or 1 for a number

h_t: the hidden states of two layers, text/classifiers.py.

The head starts from the linear probe on the frozen body, so tuning starts where the probe ends (linear probing, then
fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

import torch

from ..core.checks import require_whole
from ..core.errors import DataError
from ..data.columns import Columns, guess_columns
from ..data.labels import Kind, Labels, understand_labels
from ..data.split import duplicate_groups
from ..data.table import Table
from .base import Asked, Batch, Encoding, Examples, TaskModel
from .judging import seen_before
from .labelled import LabelledTask, labels_in
from .loading import Tokenizer, load_body, load_tokenizer, settle_length
from .registry import task
from .row_roles import ROW_ROLES, apart
from .text.classifiers import TextClassifier
from .text.padding import padded
from .text.rows import said_rows, some_of, wrong_texts


@dataclass(frozen=True, kw_only=True)
class TextClassificationSettings:
    """kind: of the labels; found where nobody says.   max_length: of a text, in tokens.

    balance: let rare classes weigh more in the loss, as if all were as frequent.
    """

    kind: Kind | None = None
    balance: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_whole(self, "max_length", least=2)


@task("text_classification")
class TextClassification(LabelledTask):
    """Text classification with a given tokenizer, columns and labels."""

    summary = "one of several classes, several at once, or a number, for texts and pairs of texts"
    Settings = TextClassificationSettings
    roles = ("text", "text_pair", "label", *ROW_ROLES)

    def __init__(
        self, tokenizer: Tokenizer, columns: Columns, labels: Labels, max_length: int | None, metric: str | None = None
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length  # None until it is settled
        self.columns, self.label_column = columns, columns.label
        self.set_labels(labels, metric)
        self.notes = list(labels.notes)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        rest, said = apart(tables["train"], asked, ROW_ROLES)
        columns = guess_columns(rest, **cast(Any, said))
        asked.decide_columns(vars(columns), columns.reasons)
        assert columns.label is not None
        labels = understand_labels(tables["train"].column(columns.label), kind=settings.kind)
        asked.plan.decide("kind", None, labels.kind, labels.reason)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        made = cls(tokenizer, columns, labels, settings.max_length, asked.metric)
        made.take_rows(tables["train"], asked, settings.balance)
        return made

    def check(self, table: Table) -> dict[int, str]:
        return {**wrong_texts(table, (self.columns.text, self.columns.text_pair)), **self.check_rows(table)}

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return self.beside.groups(table) or duplicate_groups(table.column(self.columns.text))

    def remarks(self, train: Table, test: Table) -> list[str]:
        if self.columns.text_pair is not None:
            return []
        return seen_before(train.column(self.columns.text), test.column(self.columns.text), "texts")

    def build(self, asked: Asked) -> TextClassifier:
        torch.manual_seed(asked.seed)  # of the new head
        return TextClassifier(load_body(asked.model, asked.dtype, asked.revision), self.outputs)

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        encode: Any = self.tokenizer
        ids = encode(*self._texts(some_of(train, asked.seed)), verbose=False)["input_ids"]
        lengths = [len(row) for row in ids]
        self.max_length = settle_length(self.max_length, lengths, model.body, self.tokenizer, asked)
        self.learn_from(train)

    def _texts(self, table: Table) -> tuple[list[str], list[str] | None]:
        pairs = list(table.column(self.columns.text_pair)) if self.columns.text_pair else None
        return list(table.column(self.columns.text)), pairs

    def encoding(self) -> Encoding:
        return self.encoding_with_labels((self.columns.text, self.columns.text_pair), {"max_length": self.max_length})

    def encode(self, table: Table) -> Examples:
        texts, pairs = self._texts(table)
        encoded = cast(Any, self.tokenizer)(texts, pairs, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        if pairs is None and "token_type_ids" in names:
            names.remove("token_type_ids")  # all zero: the model's own default
        inputs = [{name: encoded[name][i] for name in names} for i in range(len(table))]
        lengths = [len(row["input_ids"]) for row in inputs]
        cut = sum(bool(row.overflowing) for row in encoded.encodings or ())
        return Examples(inputs, self.targets_of(table), lengths, cut, self.beside.weights(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        fillers = {"input_ids": cast(int, self.tokenizer.pad_token_id or 0)}
        return padded(examples, indices, fillers) | examples.targets_at(indices)

    def shown_input(self, table: Table, i: int) -> str:
        return str(table.column(self.columns.text)[i])

    def resolved_settings(self) -> dict[str, Any]:
        return {**super().resolved_settings(), "kind": self.labels.kind}

    def resolved_columns(self) -> dict[str, str]:
        return {role: name for role in self.roles[:3] if (name := getattr(self.columns, role)) is not None}

    def describe(self) -> dict[str, Any]:
        columns = {k: v for k, v in asdict(self.columns).items() if k != "reasons"}
        return {**self.describe_labels(), "columns": columns, "max_length": self.max_length}

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        tokenizer = load_tokenizer(asked.model, asked.revision)
        columns = Columns(**description["columns"], reasons={})
        length, metric = int(description["max_length"]), description["metric"]
        made = cls(tokenizer, columns, labels_in(description), length, metric)
        made.take_scale(description)
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        if self.columns.text_pair is not None:
            both = f'"{self.columns.text}", "{self.columns.text_pair}"'
            raise DataError(f"this adapter reads pairs of texts ({both}): give --data FILE")
        return said_rows(self.columns.text, inputs)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.columns = self.columns.fitting(table, labelled=labelled)
        self.label_column = self.columns.label
