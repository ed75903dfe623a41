"""Sequence to sequence: summaries, translations, and whatever else a T5 or BART writes when it has read a text.

    loss = mean over the target's tokens of -log p(token | source, tokens before it)      perplexity = exp(loss)

Rows have a source and a target, or hold both in a column of translations, {"en": "...", "de": "..."}: that becomes
two columns, by their languages.  With the metric rouge_l the model also writes, token by token, when it is judged.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core.checks import require_whole
from ..core.errors import ModelError, RecipeError
from ..data.labels import check_text
from ..data.split import duplicate_groups, rows_seen, subset
from ..data.table import Problem, Table
from .base import Asked, Batch, Encoding, Examples, TaskModel
from .likelihood import METRICS, LikelihoodTask
from .loading import choose_max_length, load_body, load_tokenizer, settle_length
from .registry import task
from .rouge import rouge_l
from .row_roles import GROUP_AND_WEIGHT, groups_of, mean_weight, row_columns, weights_of, without, wrong_roles
from .seq2seq_model import Seq2SeqModel
from .source_target import by_language, source_alone, source_and_target
from .token_rows import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 2000  # rows measured for their lengths
_AT_ONCE = 8  # rows written to at a time


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSettings:
    """prefix: put before each source ("summarize: ").   max_length, max_target_length: in tokens."""

    prefix: str = ""
    max_length: int | None = None
    max_target_length: int | None = None

    def __post_init__(self) -> None:
        require_whole(self, "max_length", least=2)
        require_whole(self, "max_target_length", least=2)


@task("seq2seq")
class Seq2Seq(LikelihoodTask):
    """Sequence to sequence with a given tokenizer and columns.   target: None where rows are only to be predicted."""

    summary = "a text written to a text: summaries, translations"
    may_shorten = False
    Settings = Seq2SeqSettings
    roles = ("source", "target", *GROUP_AND_WEIGHT)
    peft_task_type = "SEQ_2_SEQ_LM"
    largest_batch = 8

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        source: str,
        target: str | None,
        settings: Seq2SeqSettings,
        metric: str | None = None,
    ) -> None:
        if hasattr(tokenizer, "tgt_lang"):
            raise ModelError(f"{type(tokenizer).__name__} wants to be told languages, which this task does not do yet")
        self.tokenizer, self.source, self.target, self.settings, self.notes = tokenizer, source, target, settings, []
        self.max_length, self.max_target_length = settings.max_length, settings.max_target_length
        self.metrics = (*METRICS, "rouge_l")
        self.judge_by(metric)
        if self.metric != "rouge_l":
            self.metrics = METRICS  # writing takes long; it is done where it was asked for

    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        parts, problems = super().read(where, settings)
        return {name: by_language(table) for name, table in parts.items()}, problems

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        beside = row_columns(tables["train"], asked, GROUP_AND_WEIGHT)
        said = {role: name for role, name in asked.columns.items() if role not in beside}
        source, target, why = source_and_target(without(tables["train"], beside), said)
        for role, name in (("source", source), ("target", target)):
            asked.plan.decide(f"{role} column", asked.columns.get(role), name, why)
        made = cls(load_tokenizer(asked.model, asked.revision), source, target, settings, asked.metric)
        made.row_columns = beside
        if "group" in beside:
            made.split_words = f'seeded, rows of one "{beside["group"]}" kept together'
        return made

    row_columns: Mapping[str, str] = MappingProxyType({})  # role of GROUP_AND_WEIGHT -> column
    mean_weight: float | None = None  # of the training rows

    def check(self, table: Table) -> dict[int, str]:
        problems = wrong_roles(table, self.row_columns)
        for column in filter(None, (self.source, self.target)):
            for i, value in enumerate(table.column(column)):
                if what := check_text(value):
                    problems[i] = f'column "{column}": {what}'
        return problems

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return groups_of(table, self.row_columns) or duplicate_groups(table.column(self.source))

    def remarks(self, train: Table, test: Table) -> list[str]:
        again = rows_seen(train.column(self.source), test.column(self.source))
        return [f"{again} of {len(test)} test sources stand in the training rows too"] if again else []

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> Seq2SeqModel:
        model = Seq2SeqModel(
            load_body(asked.model, asked.dtype, asked.revision, kind="AutoModelForSeq2SeqLM", whole=True)
        )
        model.says = self.max_target_length if self.metric == "rouge_l" else None
        return model

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        model = cast(Seq2SeqModel, model)
        self.mean_weight = mean_weight(train, self.row_columns)
        some = train.select(subset(len(train), None, _SAMPLE, asked.seed))
        sources, targets = self._tokens(some)
        lengths = [len(ids) for ids in sources]
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)
        limit = int(getattr(model.body.config, "max_position_embeddings", None) or 1 << 20)
        chosen, why = choose_max_length([len(ids) for ids in targets], limit, asked.device)
        said = self.settings.max_target_length
        self.max_target_length = asked.plan.decide("max_target_length", said, chosen, why)
        if self.max_target_length > limit:
            raise RecipeError(
                f"task.max_target_length is {self.max_target_length}, and {asked.model.name} has {limit} positions"
            )
        model.says = self.max_target_length if self.metric == "rouge_l" else None
        model.eval().check_logits(self.collate(self.encode(some.select([0])), [0]))

    # -- rows -------------------------------------------------------------------------------------------------------
    def _tokens(self, table: Table) -> tuple[list[list[int]], list[list[int]]]:
        """Sources with the prefix and targets, uncut, their ends with them; one ignored token for no target."""
        encode = cast(Any, self.tokenizer)
        texts = [self.settings.prefix + text for text in table.column(self.source)]
        sources = encode(texts, verbose=False)["input_ids"]
        if self.target is None or self.target not in table.columns:
            return sources, [[IGNORED]] * len(table)
        return sources, encode(text_target=list(table.column(self.target)), verbose=False)["input_ids"]

    def _cut(self, ids: list[int], size: int) -> list[int]:
        """At most `size` tokens; the token that ends a text stays."""
        if len(ids) <= size:
            return ids
        return [*ids[: size - 1], ids[-1]] if ids[-1] in self.tokenizer.all_special_ids else ids[:size]

    def encoding(self) -> Encoding:
        names = (self.source, self.target, self.row_columns.get("weight"))
        settings = {
            "prefix": self.settings.prefix,
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
            "mean_weight": self.mean_weight,
        }
        return Encoding(columns=list(filter(None, names)), settings=settings)

    def encode(self, table: Table) -> Examples:
        assert self.max_length is not None
        assert self.max_target_length is not None
        inputs, counts, cut = [], [], 0
        for source, target in zip(*self._tokens(table), strict=True):
            cut += len(source) > self.max_length or len(target) > self.max_target_length
            row = {
                "input_ids": self._cut(source, self.max_length),
                "targets": self._cut(target, self.max_target_length),
            }
            inputs.append(row)
            counts.append(sum(token != IGNORED for token in row["targets"]))
        lengths = [len(row["input_ids"]) + len(row["targets"]) for row in inputs]
        weights = weights_of(table, self.row_columns, self.mean_weight)
        return Examples(inputs, torch.tensor(counts), lengths, cut, weights)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        def padded(name: str, filler: int) -> Tensor:
            rows = [torch.tensor(examples.inputs[i][name]) for i in indices]
            return pad_sequence(rows, batch_first=True, padding_value=filler)

        batch = {
            "input_ids": padded("input_ids", cast(int, self.tokenizer.pad_token_id)),
            "attention_mask": (padded("input_ids", -1) != -1).long(),
            "targets": padded("targets", IGNORED),
        }
        if examples.weights is not None:
            batch["weights"] = examples.weights[list(indices)]
        return batch

    # -- learning and judging ---------------------------------------------------------------------------------------
    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, 3), and with the metric rouge_l each row's ROUGE-L as a fourth."""
        answers = super().answer(outputs, batch)
        if "said" not in outputs:
            return answers
        filler = cast(int, self.tokenizer.pad_token_id)
        targets = batch["targets"].masked_fill(batch["targets"] == IGNORED, filler)
        pairs = zip(self._texts(outputs["said"]), self._texts(targets), strict=True)
        return torch.cat([answers, answers.new_tensor([rouge_l(*pair) for pair in pairs])[:, None]], dim=1)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        figures = super().score(answers, targets)
        return {**figures, "rouge_l": float(answers[:, 3].mean())} if answers.shape[1] > 3 else figures

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        if self.metric == "rouge_l":
            return torch.stack([answers[:, 3], torch.ones_like(answers[:, 3])], dim=1)
        return super().parts(answers, targets)

    # -- saying something -------------------------------------------------------------------------------------------
    def _texts(self, ids: Tensor) -> list[str]:
        return [text.strip() for text in cast(Any, self.tokenizer).batch_decode(ids, skip_special_tokens=True)]

    def samples(self, model: TaskModel, table: Table, rows: Sequence[int]) -> list[str]:
        """What the model writes to the sources of these rows: the likeliest token each time."""
        assert self.max_target_length is not None
        model, found = cast(Seq2SeqModel, model), []
        device = next(model.body.parameters()).device
        for start in range(0, len(rows), _AT_ONCE):
            examples = self.encode(table.select(rows[start : start + _AT_ONCE]))
            batch = {name: some.to(device) for name, some in self.collate(examples, range(len(examples))).items()}
            found += self._texts(model.say(batch, self.max_target_length))
        return found

    def prompt_of(self, table: Table, row: int) -> str:
        return str(table.column(self.source)[row])

    def truth_of(self, table: Table, row: int) -> str:
        return str(table.column(cast(str, self.target))[row])

    def resolved_settings(self) -> dict[str, Any]:
        return {"max_length": self.max_length, "max_target_length": self.max_target_length}

    def resolved_columns(self) -> dict[str, str]:
        return {"source": self.source, "target": cast(str, self.target)}

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "columns": {"source": self.source, "target": self.target},
            "prefix": self.settings.prefix,
            "max_length": self.max_length,
            "max_target_length": self.max_target_length,
            "metric": self.metric,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        settings = Seq2SeqSettings(
            prefix=str(description["prefix"]),
            max_length=int(description["max_length"]),
            max_target_length=int(description["max_target_length"]),
        )
        columns = description["columns"]
        tokenizer = load_tokenizer(asked.model, asked.revision)
        return cls(tokenizer, str(columns["source"]), str(columns["target"]), settings, description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        return Table({self.source: list(inputs)}, [f"--text {i + 1}" for i in range(len(inputs))])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        if not labelled:
            self.target = None
            if self.source not in table.columns:
                self.source = source_alone(table)
        elif self.source not in table.columns or self.target not in table.columns:
            self.source, self.target, _ = source_and_target(table, {})

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        sources = table.column(self.source)
        lines = []
        for source, row in zip(sources, answers, strict=True):
            lines.append({"source": source, **self.likelihood(row)})
        return lines
