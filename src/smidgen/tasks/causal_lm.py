"""Causal language models: texts, prompts with their completions, and chats, through the model's own chat template.

    loss = mean over the tokens to be learned of -log p(token | all before it)      perplexity = exp(loss)

To be learned are the answers and what ends them; of plain texts everything.  Plain texts are packed: several documents
share a row of fixed length, each with positions of its own, and none sees another.

Tables beside the training rows may be of another shape, so that chats are learned and what became of the loss on plain
texts is told: each is read and judged as what it is.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

from torch import Tensor

from ..core.checks import require_one_of, require_whole
from ..core.errors import DataError
from ..data.conversations import ROLES, SAID, Shape, recognise
from ..data.split import duplicate_groups
from ..data.table import Table
from .base import Asked, Batch, Encoding, Examples, TaskModel
from .judging import seen_before
from .language.asking import AskingRows, in_words
from .language.chat_template import ensure_template
from .language.language_model import LanguageModel, Packing, decide_packing
from .language.likelihood import METRICS, LikelihoodTask
from .language.token_rows import as_batch, as_examples, best_fit, learns, pieces
from .loading import Tokenizer, choose_max_length, length_within, load_body, load_tokenizer, positions_of, settle_length
from .registry import task
from .row_roles import ROW_ROLES, RowRoles, apart
from .text.rows import said_rows, some_of


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings:
    """loss_on: which tokens of prompts and chats are learned.   packing: rows share blocks; "auto": plain texts do.

    max_length: of a row or a block, in tokens.
    """

    loss_on: Literal["answers", "all"] = "answers"
    packing: Packing = "auto"
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "loss_on", ("answers", "all"))
        require_one_of(self, "packing", get_args(Packing))
        require_whole(self, "max_length", least=2)


@task("causal_lm")
class CausalLM(LikelihoodTask):
    """Language modelling with a given tokenizer and shape of rows."""

    summary = "a language model that continues texts, completes prompts or answers in chats"
    may_shorten = False
    Settings = CausalLMSettings
    roles = (*ROLES, *ROW_ROLES)
    peft_task_type = "CAUSAL_LM"
    split_words = "seeded, equal prompts kept together"
    largest_batch = 8

    def __init__(
        self, tokenizer: Tokenizer, shape: Shape, settings: CausalLMSettings, metric: str | None = None
    ) -> None:
        self.tokenizer, self.settings, self.notes = tokenizer, settings, []
        self.shape = shape
        self.rows = AskingRows(tokenizer, shape, learns_all=settings.loss_on == "all")
        self.others: dict[frozenset[str], AskingRows] = {}  # by the columns of a table that is not as the training rows
        self.packs = False
        self.keeps_rows = False  # every row of a table, also one with nothing to judge, is a row of the examples
        self.metrics = METRICS
        self.judge_by(metric)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        beside = RowRoles.said(tables["train"], asked, ROW_ROLES)
        train, said = apart(tables["train"], asked, ROW_ROLES)
        shape = recognise(train, said)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        made = cls(tokenizer, shape, settings, asked.metric)
        asked.plan.decide("rows", None, in_words(shape), shape.reason)
        made._read_others(tables, asked)
        if any(rows.shape.kind != "text" for rows in (made.rows, *made.others.values())):
            asked.plan.decide("chat template", None, *ensure_template(tokenizer))
        made.take_roles(beside)
        why = "a text has no answers" if shape.kind == "text" else "as task.loss_on says; what is asked is given"
        learns_all = made.rows.learns_all or shape.kind == "text"
        asked.plan.decide("learned tokens", None, "all" if learns_all else "answers", why)
        return made

    def _read_others(self, tables: Mapping[str, Table], asked: Asked) -> None:
        """Tell the shape of each table that has other columns than the training rows.  Raises DataError."""
        for name, table in tables.items():
            if (columns := frozenset(table.names)) == frozenset(tables["train"].names) or columns in self.others:
                continue
            own, said = apart(table, asked, ROW_ROLES)
            try:
                rows = self.rows.fitting(own, said=bool(said))
            except DataError as error:
                wanted = " and ".join(f'"{column}"' for column in self.shape.columns.values())
                raise DataError(f"{name}: {error}. Or name its columns as in the training rows: {wanted}") from None
            if (rows.shape.kind, rows.shape.columns) != (self.shape.kind, self.shape.columns):
                self.others[columns] = rows
                asked.plan.decide(f"rows of {name}", None, in_words(rows.shape), rows.shape.reason)

    def rows_of(self, table: Table) -> AskingRows:
        """How rows of a table are read."""
        return self.others.get(frozenset(table.names), self.rows)

    def check(self, table: Table) -> dict[int, str]:
        return self.beside.check(table) | self.rows_of(table).check(table)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return self.beside.groups(table) or duplicate_groups(self.rows_of(table).asked(table))

    def remarks(self, train: Table, test: Table) -> list[str]:
        what = "texts" if self.shape.kind == "text" else "prompts"
        return seen_before(self.rows_of(train).asked(train), self.rows_of(test).asked(test), what)

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> LanguageModel:
        return LanguageModel(
            load_body(asked.model, asked.dtype, asked.revision, kind="AutoModelForCausalLM", whole=True)
        )

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        model = cast(LanguageModel, model)
        model.eval().check()
        packing, kind, weighted = self.settings.packing, self.shape.kind, "weight" in self.beside.columns
        self.packs = decide_packing(packing, kind, model, asked, weighted=weighted)
        self.beside = self.beside.learned(train)
        if self.packs:
            limit = positions_of(model.body)
            size, _ = choose_max_length([limit], limit, asked.device)
            choice = (size, "the size of a block")
            self.max_length = length_within(limit, "max_length", self.settings.max_length, choice, asked)
            self._say_documents(train, asked)
            return
        tokens = self.rows.tokens(some_of(train, asked.seed))
        lengths = [len(ids) for ids, _ in tokens]
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)
        if lost := sum(not learns(targets[: self.max_length]) for _, targets in tokens):
            if lost == len(tokens):
                raise DataError(f"no row has an answer within {self.max_length} tokens: raise task.max_length")
            share = f"{lost / len(tokens):.1%} of the training rows"
            asked.plan.decide("left out", None, share, f"no answer begins within {self.max_length} tokens")

    def _say_documents(self, train: Table, asked: Asked) -> None:
        """Enter in the plan how many documents share a block: a batch counts blocks."""
        assert self.max_length is not None
        rows, size = self.rows.tokens(some_of(train, asked.seed)), self.max_length
        if self.shape.kind == "text":
            rows = [piece for row in rows for piece in pieces(row, size)]
        lengths = [min(len(ids), size) for ids, _ in rows]
        shared = f"{len(lengths) / len(best_fit(lengths, size)):.1f}"
        asked.plan.decide("documents in a block", None, shared, "a batch counts blocks, so a step sees more rows")

    # -- rows -------------------------------------------------------------------------------------------------------
    def encoding(self) -> Encoding:
        settings = {
            "columns": dict(self.shape.columns),
            "kind": self.shape.kind,
            "said": self.shape.reason == SAID,
            "learns_all": self.rows.learns_all,
            "packs": self.packs,
            "keeps_rows": self.keeps_rows,
            "max_length": self.max_length,
        }
        every = [name for rows in (self.rows, *self.others.values()) for name in rows.shape.columns.values()]
        return self.beside.encoding([*dict.fromkeys(every)], settings)

    def encode(self, table: Table) -> Examples:
        assert self.max_length is not None
        reader = self.rows_of(table)
        rows = reader.tokens(table)
        if self.packs and reader.shape.kind == "text":
            rows = [piece for row in rows for piece in pieces(row, self.max_length)]
        weights = self.beside.weights(table)
        return as_examples(rows, self.max_length, weights, packed=self.packs, keep_all=self.keeps_rows)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return as_batch(examples, indices, cast(int, self.tokenizer.pad_token_id or 0))

    # -- saying something -------------------------------------------------------------------------------------------
    def prompt_of(self, table: Table, row: int) -> str:
        return self.rows_of(table).prompt(table, row)

    def truth_of(self, table: Table, row: int) -> str:
        return self.rows_of(table).truth(table, row)

    def samples(self, model: TaskModel, table: Table, rows: Sequence[int]) -> list[str]:
        """What the model says to what these rows ask, of which it reads the last `max_length` tokens at most."""
        assert self.max_length is not None
        return self.rows_of(table).said(model.body, table, rows, self.max_length)

    def resolved_settings(self) -> dict[str, Any]:
        packing = "on" if self.packs else "off"
        return {"loss_on": self.settings.loss_on, "packing": packing, "max_length": self.max_length}

    def resolved_columns(self) -> dict[str, str]:
        return dict(self.shape.columns)

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "kind": self.shape.kind,
            "columns": dict(self.shape.columns),
            "loss_on": self.settings.loss_on,
            "max_length": self.max_length,
            "metric": self.metric,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        shape = Shape.from_description(description["kind"], description["columns"])
        tokenizer = load_tokenizer(asked.model, asked.revision)
        if shape.kind != "text":
            ensure_template(tokenizer)
        settings = CausalLMSettings(loss_on=description["loss_on"], max_length=description["max_length"])
        made = cls(tokenizer, shape, settings, description["metric"])
        made.max_length, made.keeps_rows = int(description["max_length"]), True
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        if self.shape.kind != "text":
            raise DataError("this adapter answers: talk to it with smidgen chat, or give rows with --data FILE")
        return said_rows(self.shape.columns["text"], inputs)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        self.rows = self.rows.fitting(table)
        self.shape = self.rows.shape
        if self.shape.kind != "text":
            ensure_template(self.tokenizer)

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        return [{"prompt": self.prompt_of(table, i), **self.likelihood(row)} for i, row in enumerate(answers)]
