"""Sequence to sequence: summaries, translations, and whatever else a T5 or BART writes when it has read a text.

    loss = mean over the target's tokens of -log p(token | source, tokens before it)      perplexity = exp(loss)

Rows have a source and a target, or hold both in a column of translations, {"en": "...", "de": "..."}: that becomes
two columns, by their languages.  Prompts and chats are read too (language/source_target.py).  With a metric of what is
written (language/writing.py) the model also writes, token by token, when it is judged, to a bounded number of rows.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, cast

from torch import Tensor

from ..core.checks import require_whole
from ..data.split import duplicate_groups
from ..data.table import Problem, Table
from .base import Asked, Batch, Encoding, Examples, TaskModel
from .judging import seen_before
from .language.pair_tokens import PairTokens
from .language.seq2seq_model import Seq2SeqModel
from .language.source_target import ROLES, SourceTarget, by_language, source_and_target
from .language.writing import WritingTask
from .loading import Tokenizer, choose_max_length, length_within, load_body, load_tokenizer, positions_of, settle_length
from .registry import task
from .row_roles import ROW_ROLES, RowRoles, apart
from .text.rows import some_of

_AT_ONCE = 8  # rows written to at a time


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings:
    """prefix: put before each source ("summarize: ").   max_length, max_target_length: in tokens.

    source_language, target_language: by the names that a tokenizer of many languages has for them, "eng_Latn".
    written: of a table's rows so many at most, evenly spread, are written to where the metric asks for it.
    """

    prefix: str = ""
    source_language: str | None = None
    target_language: str | None = None
    written: int = 500
    max_length: int | None = None
    max_target_length: int | None = None

    def __post_init__(self) -> None:
        require_whole(self, "max_length", "max_target_length", least=2)
        require_whole(self, "written")


@task("seq2seq")
class Seq2Seq(WritingTask):
    """Sequence to sequence with a given tokenizer and columns."""

    summary = "a text written to a text: summaries, translations"
    may_shorten = False
    Settings = Seq2SeqSettings
    roles = (*ROLES, *ROW_ROLES)
    peft_task_type = "SEQ_2_SEQ_LM"
    largest_batch = 8
    split_words = "seeded, equal sources kept together"

    def __init__(
        self, tokenizer: Tokenizer, columns: SourceTarget, settings: Seq2SeqSettings, metric: str | None = None
    ) -> None:
        self.tokens = PairTokens(tokenizer, settings.prefix, (settings.source_language, settings.target_language))
        self.tokenizer, self.columns, self.settings, self.notes = tokenizer, columns, settings, []
        self.max_length, self.max_target_length = settings.max_length, settings.max_target_length
        self.judge_by(metric)

    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        parts, problems = super().read(where, settings)
        return {name: by_language(table) for name, table in parts.items()}, problems

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        beside = RowRoles.said(tables["train"], asked, ROW_ROLES)
        found = source_and_target(*apart(tables["train"], asked, ROW_ROLES))
        asked.decide_columns(found.columns, dict.fromkeys(found.columns, found.reason))
        tokenizer = load_tokenizer(asked.model, asked.revision)
        made = cls(tokenizer, found, settings, asked.metric)
        made.take_roles(beside)
        return made

    def check(self, table: Table) -> dict[int, str]:
        return self.beside.check(table) | self.columns.check(table)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return self.beside.groups(table) or duplicate_groups(self.columns.sources(table))

    def remarks(self, train: Table, test: Table) -> list[str]:
        return seen_before(self.columns.sources(train), self.columns.sources(test), "sources")

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> Seq2SeqModel:
        model = Seq2SeqModel(
            load_body(asked.model, asked.dtype, asked.revision, kind="AutoModelForSeq2SeqLM", whole=True)
        )
        model.says, model.begins = self.max_target_length, self.tokens.begins
        return model

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        model = cast(Seq2SeqModel, model)
        self.beside = self.beside.learned(train)
        some = some_of(train, asked.seed)
        sources, targets = self._tokens(some)
        lengths = [len(ids) for ids in sources]
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)
        limit, said = positions_of(model.body), self.settings.max_target_length
        choice = choose_max_length([len(ids) for ids in targets], limit, asked.device)
        self.max_target_length = length_within(limit, "max_target_length", said, choice, asked)
        model.says = self.max_target_length
        model.eval().check_logits(self.collate(self.encode(some.select([0])), [0]))

    # -- rows -------------------------------------------------------------------------------------------------------
    def _tokens(self, table: Table) -> tuple[list[list[int]], list[list[int]]]:
        return self.tokens.of(self.columns.sources(table), self.columns.targets(table))

    def encoding(self) -> Encoding:
        settings = {
            "columns": dict(self.columns.columns),
            "answered": self.columns.answered,
            "prefix": self.settings.prefix,
            "languages": [self.settings.source_language, self.settings.target_language],
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
        }
        return self.beside.encoding([*self.columns.columns.values()], settings)

    def encode(self, table: Table) -> Examples:
        assert self.max_length is not None
        assert self.max_target_length is not None
        sizes = (self.max_length, self.max_target_length)
        return self.tokens.examples(*self._tokens(table), *sizes, self.beside.weights(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return self.tokens.batch(examples, indices, self.settings.written if self.writes else 0)

    # -- saying something -------------------------------------------------------------------------------------------
    def samples(self, model: TaskModel, table: Table, rows: Sequence[int]) -> list[str]:
        """What the model writes to the sources of these rows: the likeliest token each time."""
        assert self.max_target_length is not None
        model, examples = cast(Seq2SeqModel, model), self.encode(table.select(rows))
        parts = [range(start, min(start + _AT_ONCE, len(rows))) for start in range(0, len(rows), _AT_ONCE)]
        said = [model.say(self.collate(examples, some), self.max_target_length) for some in parts]
        return [text for ids in said for text in self.tokens.texts(ids)]

    def prompt_of(self, table: Table, row: int) -> str:
        return self.columns.sources(table)[row]

    def truth_of(self, table: Table, row: int) -> str:
        return cast("list[str]", self.columns.targets(table))[row]

    def resolved_settings(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "max_target_length": self.max_target_length}

    def resolved_columns(self) -> dict[str, str]:
        return dict(self.columns.columns)

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        chosen = {**asdict(self.settings), **self.resolved_settings()}
        return {"task": self.name, "metric": self.metric, "columns": dict(self.columns.columns), **chosen}

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        said = {field.name: description[field.name] for field in fields(Seq2SeqSettings) if field.name in description}
        columns = SourceTarget.from_description(description["columns"])
        tokenizer = load_tokenizer(asked.model, asked.revision)
        return cls(tokenizer, columns, Seq2SeqSettings(**said), description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        return self.columns.rows_of(inputs)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.columns = self.columns.fitting(table, labelled=labelled)

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        rows = zip(self.columns.sources(table), answers, strict=True)
        return [{"source": source, **self.likelihood(row)} for source, row in rows]
