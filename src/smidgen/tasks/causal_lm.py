"""Causal language models: texts, prompts with their completions, and chats, through the model's own chat template.

    loss = mean over the tokens to be learned of -log p(token | all before it)      perplexity = exp(loss)

To be learned are the answers and what ends them; of plain texts everything.  Plain texts are packed: several documents
share a row of fixed length, each with positions of its own, and none sees another.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor

from ..core.checks import require_one_of, require_whole
from ..core.errors import DataError, RecipeError
from ..data.conversations import ROLES, Kind, Shape, before_answer, recognise
from ..data.lazy import Lazy
from ..data.split import duplicate_groups, rows_seen, subset
from ..data.table import Table
from .base import Asked, Batch, Encoding, Examples, TaskModel
from .chat_template import answers_in, encoded, ensure_template, rendered
from .language_model import LanguageModel
from .likelihood import METRICS, LikelihoodTask
from .loading import choose_max_length, load_body, load_tokenizer, settle_length
from .padding import padded
from .registry import task
from .row_roles import GROUP_AND_WEIGHT, groups_of, mean_weight, row_columns, weights_of, without, wrong_roles
from .saying import opening, question, say
from .token_rows import IGNORED, Tokens, blocks, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 2000  # rows measured for their length
_OPENING, _GOES_ON = 60, 200  # characters of a text that is to go on, and of how it does
_SAID = 48  # tokens of a sample


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings:
    """loss_on: which tokens of prompts and chats are learned.   packing: rows share blocks; "auto": plain texts do.

    max_length: of a row or a block, in tokens.
    """

    loss_on: Literal["answers", "all"] = "answers"
    packing: Literal["auto", "on", "off"] = "auto"
    max_length: int | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "loss_on", ("answers", "all"))
        require_one_of(self, "packing", ("auto", "on", "off"))
        require_whole(self, "max_length", least=2)


@task("causal_lm")
class CausalLM(LikelihoodTask):
    """Language modelling with a given tokenizer and shape of rows."""

    summary = "a language model that continues texts, completes prompts or answers in chats"
    may_shorten = False
    Settings = CausalLMSettings
    roles = (*ROLES, *GROUP_AND_WEIGHT)
    peft_task_type = "CAUSAL_LM"
    split_words = "seeded, equal prompts kept together"
    largest_batch = 8

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", shape: Shape, settings: CausalLMSettings, metric: str | None = None
    ) -> None:
        self.tokenizer, self.shape, self.settings, self.notes = tokenizer, shape, settings, []
        self.learns_all = settings.loss_on == "all" or shape.kind == "text"
        self.packs = False
        self.keeps_rows = False  # every row of a table, also one with nothing to judge, is a row of the examples
        self.metrics = METRICS
        self.judge_by(metric)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        beside = row_columns(tables["train"], asked, GROUP_AND_WEIGHT)
        said = {role: name for role, name in asked.columns.items() if role not in beside}
        shape = recognise(without(tables["train"], beside), said)
        asked.plan.decide("rows", None, _in_words(shape), shape.reason)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        if shape.kind != "text":
            asked.plan.decide("chat template", None, *ensure_template(tokenizer))
        made = cls(tokenizer, shape, settings, asked.metric)
        made.row_columns = beside
        if "group" in beside:
            made.split_words = f'seeded, rows of one "{beside["group"]}" kept together'
        why = "a text has no answers" if shape.kind == "text" else "as task.loss_on says; what is asked is given"
        asked.plan.decide("learned tokens", None, "all" if made.learns_all else "answers", why)
        return made

    row_columns: Mapping[str, str] = MappingProxyType({})  # role of GROUP_AND_WEIGHT -> column
    mean_weight: float | None = None  # of the training rows

    def check(self, table: Table) -> dict[int, str]:
        problems = wrong_roles(table, self.row_columns)
        for name in self.shape.columns.values():
            table.column(name)  # one mistake, not one per row
        for i in range(len(table)):
            try:
                self._rendered(table, i)
            except DataError as error:
                problems[i] = str(error)
        return problems

    def _rendered(self, table: Table, i: int) -> tuple[str, Any]:
        """Row i as text, and the spans of its answers in it, None where all is learned.  Raises DataError."""
        if self.shape.kind == "text":
            return self.shape.text(table, i), None
        turns = self.shape.turns(table, i)
        if self.learns_all:
            return rendered(self.tokenizer, turns, asks=False), None
        return answers_in(self.tokenizer, turns)

    def _tokens(self, table: Table) -> list[Tokens]:
        """All rows as tokens, uncut."""
        rows = [self._rendered(table, i) for i in range(len(table))]
        if self.shape.kind != "text":
            return encoded(self.tokenizer, [text for text, _ in rows], [spans for _, spans in rows])
        found: Any = cast(Any, self.tokenizer)([text for text, _ in rows], verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        ids = [row if end is None or row[-1:] == [end] else [*row, end] for row in found]
        return [(row, [IGNORED, *row[1:]]) for row in ids]

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return groups_of(table, self.row_columns) or duplicate_groups(self._asked(table))

    def remarks(self, train: Table, test: Table) -> list[str]:
        again = rows_seen(self._asked(train), self._asked(test))
        what = "texts" if self.shape.kind == "text" else "prompts"
        return [f"{again} of {len(test)} test {what} stand in the training rows too"] if again else []

    def _asked(self, table: Table) -> Sequence[str]:
        """What makes rows the same: the whole text, or all before the first answer."""
        if self.shape.kind == "text":
            return table.column(self.shape.columns["text"])
        return Lazy(lambda rows: [self.prompt_of(table, i) for i in rows], range(len(table)))

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> LanguageModel:
        return LanguageModel(
            load_body(asked.model, asked.dtype, asked.revision, kind="AutoModelForCausalLM", whole=True)
        )

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        model = cast(LanguageModel, model)
        model.eval().check()
        self.packs = self._decide_packing(model, asked)
        self.mean_weight = mean_weight(train, self.row_columns)
        if self.packs:
            limit = getattr(model.body.config, "max_position_embeddings", None) or 1 << 20
            size, _ = choose_max_length([limit], limit, asked.device)
            self.max_length = asked.plan.decide("max_length", self.settings.max_length, size, "the size of a block")
            if self.max_length > limit:
                raise RecipeError(f"task.max_length is {self.max_length}, and {asked.model.name} has {limit} positions")
            return
        tokens = self._tokens(train.select(subset(len(train), None, _SAMPLE, asked.seed)))
        lengths = [len(ids) for ids, _ in tokens]
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)
        if lost := sum(not self._learns(targets) for _, targets in tokens):
            if lost == len(tokens):
                raise DataError(f"no row has an answer within {self.max_length} tokens: raise task.max_length")
            share = f"{lost / len(tokens):.1%} of the training rows"
            asked.plan.decide("left out", None, share, f"no answer begins within {self.max_length} tokens")

    def _decide_packing(self, model: LanguageModel, asked: Asked) -> bool:
        said = self.settings.packing
        if said == "off" or (said == "auto" and self.shape.kind != "text"):
            why = "batches are of rows of like length, so little is padded; a mask for each block would cost more"
            return asked.plan.decide("packing", False if said == "off" else None, False, why)
        if asked.reserved:
            why_not: str | None = "its prompt stands in front of the first document alone"
        elif "weight" in self.row_columns:
            why_not = "each has a weight of its own"
        else:
            why_not = model.why_not_packed()
        if said == "on" and why_not:
            raise RecipeError(f"task.packing is on, but rows cannot share a block: {why_not}")
        why = why_not or "documents share blocks and do not see each other; checked on this model"
        return asked.plan.decide("packing", True if said == "on" else None, why_not is None, why)

    def _learns(self, targets: list[int]) -> bool:
        return any(target != IGNORED for target in targets[: self.max_length])

    # -- rows -------------------------------------------------------------------------------------------------------
    def encoding(self) -> Encoding:
        names = (*self.shape.columns.values(), self.row_columns.get("weight"))
        settings = {
            "columns": dict(self.shape.columns),
            "kind": self.shape.kind,
            "learns_all": self.learns_all,
            "packs": self.packs,
            "keeps_rows": self.keeps_rows,
            "max_length": self.max_length,
            "mean_weight": self.mean_weight,
        }
        return Encoding(columns=list(filter(None, names)), settings=settings)

    def encode(self, table: Table) -> Examples:
        assert self.max_length is not None
        rows = self._tokens(table)
        if self.packs and self.shape.kind == "text":
            rows = [piece for row in rows for piece in pieces(row, self.max_length)]
        cut = sum(len(ids) > self.max_length for ids, _ in rows)
        rows = [(ids[: self.max_length], targets[: self.max_length]) for ids, targets in rows]
        weights = weights_of(table, self.row_columns, self.mean_weight)
        if not self.keeps_rows:
            kept = [i for i, row in enumerate(rows) if self._learns(row[1])]
            rows, weights = [rows[i] for i in kept], None if weights is None else weights[kept]
        inputs: list[dict[str, list[int]]] = [{"input_ids": ids, "targets": targets} for ids, targets in rows]
        if self.packs:
            inputs = blocks(rows, self.max_length)
        counts = [sum(target != IGNORED for target in row["targets"]) for row in inputs]
        return Examples(inputs, torch.tensor(counts), [len(row["input_ids"]) for row in inputs], cut, weights)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        fillers = {"input_ids": cast(int, self.tokenizer.pad_token_id or 0), "targets": IGNORED}
        batch = padded(examples, indices, fillers)
        if "position_ids" in batch:
            del batch["attention_mask"]  # padding stands at position 0 each: documents of one token
        if examples.weights is not None:
            batch["weights"] = examples.weights[list(indices)]
        return batch

    # -- learning and judging ---------------------------------------------------------------------------------------
    # -- saying something -------------------------------------------------------------------------------------------
    def prompt_of(self, table: Table, row: int) -> str:
        """What a model is asked in a row, in words: all before the first answer, or how a text begins."""
        if self.shape.kind == "text":
            return self.shape.text(table, row)[:_OPENING].rpartition(" ")[0] or self.shape.text(table, row)[:_OPENING]
        before = before_answer(self.shape.turns(table, row))
        if len(before) == 1:
            return before[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)

    def truth_of(self, table: Table, row: int) -> str:
        """The first answer, or how the text goes on."""
        if self.shape.kind == "text":
            return self.shape.text(table, row)[len(self.prompt_of(table, row)) :][:_GOES_ON].strip()
        return next(turn.content for turn in self.shape.turns(table, row) if turn.is_answer)

    def samples(self, model: TaskModel, table: Table, rows: Sequence[int]) -> list[str]:
        """What the model says to the prompts of these rows: the likeliest token each time, 48 tokens at most."""
        said = []
        for row in rows:
            if self.shape.kind == "text":
                ids = opening(self.tokenizer, self.prompt_of(table, row))
            else:
                ids = question(self.tokenizer, before_answer(self.shape.turns(table, row)))
            said.append(say(model.body, self.tokenizer, ids, _SAID))
        return said

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
        kind = description["kind"]
        columns = {str(role): str(name) for role, name in dict(description["columns"]).items()}
        needed = {"text": {"text"}, "completion": {"prompt", "completion"}, "chat": {"messages"}}[kind]
        if not needed <= set(columns) <= set(ROLES):
            raise ValueError(f"columns {columns} are not those of {kind}")
        tokenizer = load_tokenizer(asked.model, asked.revision)
        if kind != "text":
            ensure_template(tokenizer)
        settings = CausalLMSettings(loss_on=description["loss_on"], max_length=description["max_length"])
        made = cls(tokenizer, Shape(kind=cast(Kind, kind), columns=columns), settings, description["metric"])
        made.max_length, made.keeps_rows = int(description["max_length"]), True
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        if self.shape.kind != "text":
            raise DataError("this adapter answers: talk to it with smidgen chat, or give rows with --data FILE")
        return Table({self.shape.columns["text"]: list(inputs)}, [f"--text {i + 1}" for i in range(len(inputs))])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        if any(name not in table.columns for name in self.shape.columns.values()):
            found = recognise(table, {})
            if (found.kind == "text") != (self.shape.kind == "text"):
                raise DataError(f"the rows are {_in_words(found)}; this adapter learned from {_in_words(self.shape)}")
            self.shape = found

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        lines = []
        for i, row in enumerate(answers):
            lines.append({"prompt": self.prompt_of(table, i), **self.likelihood(row)})
        return lines


def _in_words(shape: Shape) -> str:
    words = {"text": "plain texts", "completion": "prompts and completions", "chat": "chats"}
    return f"{words[shape.kind]} ({', '.join(shape.columns.values())})"
