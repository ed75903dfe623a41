"""Token classification: a tag for each word, such as named entities or parts of speech.

The body is the pre-trained model as it is; the task adds a linear head on the first sub-word of each word:

    outputs = W h + c       W: (K, 2 D)   K = tags;   h: the middle and the last hidden state of that sub-word

Words that a maximal length cuts off get no tag, and count as wrong.  Entities are judged whole, see `spans.py`.
"""

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_one_of, require_whole
from ..core.errors import DataError, ModelError
from ..data.conll import read_conll
from ..data.lazy import mapped
from ..data.split import duplicate_groups, rows_seen, subset
from ..data.table import Problem, Table
from .base import Asked, Batch, Encoding, Example, Examples, Task, TaskModel
from .loading import load_body, load_tokenizer, settle_length
from .padding import padded
from .registry import task
from .spans import NO_TAG, SCHEMES, Scheme, Tags, f1_by_type, span_scores, understand_tags
from .word_columns import WordColumns, guess_word_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 2000  # rows measured for their length
_ENTITIES, _PLAIN = ("f1", "precision", "recall", "macro_f1"), ("accuracy", "macro_f1")
_WORD = re.compile(r"(?:\w\.){2,}|\w+(?:[-'.]\w+)*|[^\w\s]")  # of a text that nobody has split


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
class TokenClassification(Task):
    """Token classification with a given tokenizer, columns and tags."""

    summary = "named entities, parts of speech and other tags of words"
    may_shorten = False
    Settings = TokenClassificationSettings
    roles = ("tokens", "tags", "document")
    probed = True
    smooths = True

    max_length: int

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        columns: WordColumns,
        tags: Tags,
        max_length: int,
        metric: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which sub-word is of which word: it is no fast one"
            )
        self.tokenizer, self.columns, self.tags, self.max_length = tokenizer, columns, tags, max_length
        self.metrics = _PLAIN if tags.scheme == "plain" else _ENTITIES
        self.judge_by(metric)
        self.notes = []
        self._index = {name: i for i, name in enumerate(tags.names)}
        # byte-level tokenizers take the space before a word as a part of it
        encode: Any = tokenizer
        alone = encode(["a", "b"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        self._space = "" if encode("a b", add_special_tokens=False)["input_ids"] == alone else " "

    _said_length: int | None = None

    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        found = read_conll(where)
        return found if found[0] else super().read(where, settings)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train = tables["train"]
        columns, reasons = guess_word_columns(train, asked.columns, tag_names=settings.tag_names or ())
        for role, why in reasons.items():
            asked.plan.decide(f"{role} column", asked.columns.get(role), getattr(columns, role), why)
        tags, why = understand_tags(columns.tag_rows(train) or [], settings.scheme)
        asked.plan.decide("scheme", settings.scheme, tags.scheme, why)
        made = cls(load_tokenizer(asked.model, asked.revision), columns, tags, 0, asked.metric)
        made._said_length = settings.max_length
        return made

    def check(self, table: Table) -> dict[int, str]:
        return self.columns.check(table, self.tags)

    def strata(self, table: Table) -> Sequence[Any] | None:
        """The rarest tag of each row."""
        rows = self.columns.tag_rows(table)
        counts = Counter(tag for row in rows or [] for tag in row)
        return rows and [min(row, key=lambda tag: (counts[tag], tag), default="") for row in rows]

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """Documents stay whole; where there are none, equal sentences stay together."""
        if self.columns.document is not None:
            return cast(list[Hashable], table.column(self.columns.document))
        return duplicate_groups(self._texts(table))

    def _texts(self, table: Table) -> Sequence[str]:
        return mapped(self.columns.words(table), " ".join)

    def remarks(self, train: Table, test: Table) -> list[str]:
        again = rows_seen(self._texts(train), self._texts(test))
        if not again:
            return []
        return [
            f"{again} of {len(test)} test rows stand in the training rows too: the figures are flattered by that much"
        ]

    def build(self, asked: Asked) -> "TokenClassifier":
        torch.manual_seed(asked.seed)  # of the new head
        return TokenClassifier(load_body(asked.model, asked.dtype, asked.revision), len(self.tags.names))

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        some = train.select(subset(len(train), None, _SAMPLE, asked.seed))
        lengths = [len(ids) for ids in self._encoded(some, verbose=False)["input_ids"]]
        self.max_length = settle_length(self._said_length, lengths, model.body, self.tokenizer, asked, whole=True)

    def _encoded(self, table: Table, **how: Any) -> Any:
        rows = [[words[0], *(self._space + word for word in words[1:])] for words in self.columns.words(table)]
        return cast(Any, self.tokenizer)(rows, is_split_into_words=True, **how)

    def encoding(self) -> Encoding:
        names = (self.columns.tokens, self.columns.tags)
        settings = {"max_length": self.max_length, "tags": self.tags.names, "tag_names": self.columns.tag_names}
        return Encoding(columns=list(filter(None, names)), settings=settings, filler=NO_TAG)

    def encode(self, table: Table) -> Examples:
        encodings = self._encoded(table, truncation=True, max_length=self.max_length).encodings
        inputs, lengths = [], []
        for encoding in encodings:
            firsts: dict[int, int] = {}  # word -> its first sub-word; a word may have none
            for position, word in enumerate(encoding.word_ids):
                if word is not None and word < self.max_length:
                    firsts.setdefault(word, position)
            inputs.append({"input_ids": encoding.ids, "words": list(firsts), "firsts": list(firsts.values())})
            lengths.append(len(encoding.ids))
        targets = torch.full((len(table), max(map(len, self.columns.words(table)))), NO_TAG)
        for row, tags in zip(targets, self.columns.tag_rows(table) or (), strict=False):
            row[: len(tags)] = torch.tensor([self._index[tag] for tag in tags])
        return Examples(inputs, targets, lengths, sum(bool(encoding.overflowing) for encoding in encodings))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """firsts: where the first sub-word of each word is, words: which word that is, targets: its tag; each (N, T),
        -1 and NO_TAG beyond them.
        """
        fillers = {"input_ids": cast(int, self.tokenizer.pad_token_id or 0), "words": -1, "firsts": -1}
        batch = padded(examples, indices, fillers)
        tags = examples.targets[list(indices)].gather(1, batch["words"].clamp_min(0))
        return {**batch, "targets": tags.where(batch["words"] >= 0, NO_TAG)}

    def feature_targets(self, batch: Batch) -> Tensor:
        return batch["targets"][batch["words"] >= 0]

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        targets = batch["targets"] if batch["targets"].ndim == 1 else self.feature_targets(dict(batch))
        loss = F.cross_entropy(outputs.float(), targets, reduction="sum", label_smoothing=self.label_smoothing)
        return loss, len(targets)

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """The tag of each word (rows, max_length), NO_TAG where there is no word or it was cut off."""
        words = batch["words"]
        rows, places = (words >= 0).nonzero(as_tuple=True)
        answers = words.new_full((len(words), self.max_length), NO_TAG)
        answers[rows, words[rows, places]] = outputs.argmax(1)
        return answers

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        counts = self.tags.counts(answers, targets).sum(0)
        scores = {name: float(value) for name, value in self._figures(counts).items()}
        if self.tags.scheme != "plain":
            by_type = zip(self.tags.types, f1_by_type(counts).tolist(), counts[:, 2].tolist(), strict=True)
            scores.update({f"f1 {kind}": value for kind, value, there in by_type if there})
        return scores

    def _figures(self, counts: Tensor) -> dict[str, Tensor]:
        found = span_scores(counts)
        found["accuracy"] = found["recall"]  # where each word is an entity of its own
        return {name: found[name] for name in self.metrics}

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        return self.tags.counts(answers, targets).flatten(1)

    def value_of(self, sums: Tensor) -> Tensor:
        return self._figures(sums.view(*sums.shape[:-1], -1, 3))[self.metric]

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """The usual tag; where there are entities, that is none, and would say nothing."""
        if self.tags.scheme != "plain":
            return None
        usual = int(torch.bincount(targets[targets != NO_TAG]).argmax())
        return "majority", torch.full((count, max(self.max_length, targets.shape[1])), usual)

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Rows of which exactly one has all right."""
        counts = [self.tags.counts(answers, targets).sum(1) for answers in (base, tuned)]
        right = [(c[:, 0] == c[:, 1]) & (c[:, 0] == c[:, 2]) for c in counts]
        found = []
        for i in (right[0] != right[1]).nonzero()[:, 0].tolist():
            words = self.columns.words(table)[i]
            truth, by_base, by_tuned = (self._said(words, tags[i]) for tags in (targets, base, tuned))
            text = " ".join(words)
            better: Literal["base", "tuned"] = "tuned" if right[1][i] else "base"
            found.append(Example(text=text, truth=truth, base=by_base, tuned=by_tuned, better=better))
        return found

    def _said(self, words: list[str], tags: Tensor) -> str:
        if self.tags.scheme == "plain":
            return " ".join(name or "(cut off)" for name in self._names(words, tags))
        spans = self.tags.spans(tags[: len(words)])
        return ", ".join(f"{' '.join(words[start:end])} ({kind})" for start, end, kind in spans) or "none"

    def _names(self, words: list[str], tags: Tensor) -> list[str | None]:
        """The tag of each word, None for those that were cut off."""
        said = [self.tags.names[tag] if tag >= 0 else None for tag in tags[: len(words)].tolist()]
        return said + [None] * (len(words) - len(said))

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        """Words with their entities, which go from word "start" to the one before "end"; or with their tags."""
        lines: list[dict[str, Any]] = []
        for words, tags in zip(self.columns.words(table), answers, strict=True):
            if self.tags.scheme == "plain":
                lines.append({"tokens": words, "tags": self._names(words, tags)})
                continue
            entities = [
                {"type": kind, "words": words[start:end], "start": start, "end": end}
                for start, end, kind in self.tags.spans(tags[: len(words)])
            ]
            lines.append({"tokens": words, "entities": entities})
        return lines

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
        if description["scheme"] not in SCHEMES:
            raise ValueError(f"there is no scheme {description['scheme']!r}")
        said = dict(description["columns"])
        columns = WordColumns(**{**said, "tag_names": tuple(map(str, said["tag_names"]))})
        tags = Tags(scheme=cast(Scheme, description["scheme"]), names=tuple(map(str, description["tags"])))
        tokenizer = load_tokenizer(asked.model, asked.revision)
        return cls(tokenizer, columns, tags, int(description["max_length"]), description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        origins = [f"--text {i + 1}" for i in range(len(inputs))]
        empty = [origin for origin, text in zip(origins, inputs, strict=True) if not _WORD.search(text)]
        if empty:
            raise DataError(f"{', '.join(empty)}: no words")
        return Table({self.columns.tokens: [_WORD.findall(text) for text in inputs]}, origins)

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        wanted = (self.columns.tokens, self.columns.tags if labelled else None)
        if any(name is not None and name not in table.columns for name in wanted):
            names = self.columns.tag_names
            self.columns, _ = guess_word_columns(table, {}, tag_names=names, allow_untagged=not labelled)
        if not labelled:
            self.columns = replace(self.columns, tags=None)


class TokenClassifier(TaskModel):
    """A pre-trained body, and a linear head in fp32 on the middle and last hidden states of each word."""

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__()
        config: Any = body.config
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{config.model_type} is an encoder-decoder; token classification takes an encoder (BERT, DeBERTa ...)"
            )
        self.body = body
        self.head: nn.Linear = nn.Linear(2 * config.hidden_size, outputs, device=next(body.parameters()).device)

    def features(self, batch: Batch) -> Tensor:
        """The hidden states of the middle and the last layer at each word's first sub-word, (M, 2 D) in fp32."""
        out = self.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        rows, places = (batch["firsts"] >= 0).nonzero(as_tuple=True)
        at = (rows, batch["firsts"][rows, places])
        middle = out.hidden_states[len(out.hidden_states) // 2]
        return torch.cat([middle[at], out.last_hidden_state[at]], dim=-1).float()

    def forward(self, batch: Batch) -> Tensor:
        """(M, K): a line for each word."""
        return cast(Tensor, self.head(self.features(batch)))
