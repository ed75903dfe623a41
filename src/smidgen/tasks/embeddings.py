"""Embeddings: texts as vectors, near one another where the texts belong together; for search and comparison.

    z = pool(h) / |pool(h)|        h: last hidden states, pooled as the model was trained      similarity = z_1 z_2

Two shapes of data.  Pairs that belong together, such as a question and its answer, and perhaps a wrong answer: each
text is to find its own among those of the batch, and is judged by finding it among all.  Pairs with a score of their
similarity: the pairs are to be in the order of the scores, and are judged by rank correlation.

The negatives of a batch are those of one micro-batch: `accumulate` brings no more of them, a larger `batch` does, and
losses of batches of different size cannot be compared.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_above_zero, require_one_of, require_whole
from ..core.errors import DataError
from ..data.labels import check_text
from ..data.lazy import joined
from ..data.split import duplicate_groups, subset
from ..data.table import Table
from ..data.values import number
from .base import Asked, Batch, Encoding, Example, Examples, Task, TaskModel
from .loading import load_body, load_tokenizer, settle_length
from .padding import padded
from .pair_columns import ROLES, pair_columns, score_range
from .ranking import mrr_at, recall_at
from .registry import task
from .row_roles import groups_of, row_columns, without, wrong_roles
from .sentence_pooling import Embedder, Pooling, save_trained, trained_pooling, trained_prompts, usual_pooling
from .similarity import Search, connected, contrastive_loss, cosent_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Literal["contrastive", "cosent", "cosine"]
Side = Literal["text", "text_pair", "negative"]
_SIDES: tuple[Side, ...] = get_args(Side)
_SAMPLE = 2000  # rows measured for their length


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
class Embeddings(Task):
    """Embeddings with a given tokenizer, columns (role -> name) and settings, of which none is None.

    scores: the lowest and highest that a pair can have, which the squared error takes for cosines of 0 and 1.
    """

    summary = "vectors of texts, learned from pairs that belong together or have a score of similarity"
    Settings = EmbeddingsSettings
    roles = (*ROLES, "group")
    split_words = "seeded, rows that share a text kept together"
    largest_batch = 64

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        columns: Mapping[str, str],
        settings: EmbeddingsSettings,
        scores: tuple[float, float] = (0.0, 1.0),
        metric: str | None = None,
    ) -> None:
        self.tokenizer, self.columns, self.settings, self.scores = tokenizer, dict(columns), settings, scores
        self.max_length = settings.max_length
        self.finds = settings.loss == "contrastive"
        self.metrics = ("mrr@10", "recall@1", "recall@5", "recall@10") if self.finds else ("spearman", "pearson")
        self.judge_by(metric)
        self.notes: list[str] = []
        self._is_judged = True

    # -- reading ----------------------------------------------------------------------------------------------------
    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        scored = None if settings.loss is None else settings.loss != "contrastive"
        beside = row_columns(tables["train"], asked, ("group",))
        said = {role: name for role, name in asked.columns.items() if role not in beside}
        columns, reasons = pair_columns(without(tables["train"], beside), said, scored=scored)
        for role, why in reasons.items():
            asked.plan.decide(f"{role} column", asked.columns.get(role), columns[role], why)
        found, why = (
            ("cosent", "the pairs have scores") if "score" in columns else ("contrastive", "no scores are given")
        )
        loss = asked.plan.decide("loss", settings.loss, cast(Loss, found), why)
        tokenizer = load_tokenizer(asked.model, asked.revision)
        made = cls(
            tokenizer, columns, replace(settings, loss=loss, **_as_trained(settings, asked)), metric=asked.metric
        )
        made.row_columns = beside
        if "group" in beside:
            made.split_words = f'seeded, rows of one "{beside["group"]}" kept together'
        if "score" in columns:
            made.scores = score_range(tables["train"].column(columns["score"]))
        else:
            made.notes.append("queries are ranked among the different documents of the rows that judge, and no others")
        return made

    def _sides(self, table: Table) -> list[Side]:
        return [side for side in _SIDES if self.columns.get(side) in table.columns]

    def check(self, table: Table) -> dict[int, str]:
        problems = wrong_roles(table, self.row_columns)
        names = [name for role, name in self.columns.items() if role != "score"]
        for i, texts in enumerate(zip(*map(table.column, names), strict=True)):
            wrong = [
                f'column "{name}": {what}'
                for name, text in zip(names, texts, strict=True)
                if (what := check_text(text))
            ]
            if not wrong and self.finds and self._is_judged and len(set(duplicate_groups(texts))) < len(texts):
                wrong = ["two texts of the row are the same: there is nothing to tell apart"]
            if wrong:
                problems[i] = "; ".join(wrong)
        if "score" in self.columns:
            for i, value in enumerate(table.column(self.columns["score"])):
                if number(value) is None:
                    problems[i] = f'column "{self.columns["score"]}": {value!r:.40} is no number'
        return problems

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """What the column "group" says; else rows that share a text, whichever side it is on, and rows that share one
        with those.
        """
        if "group" in self.row_columns:
            return groups_of(table, self.row_columns)
        ids = self._numbers(table)
        return connected([row[:2] for row in ids.tolist()])

    def strata(self, table: Table) -> Sequence[Any] | None:
        return None if self.finds else self._scores(table).tolist()

    row_columns: Mapping[str, str] = MappingProxyType({})  # "group" -> column

    def remarks(self, train: Table, test: Table) -> list[str]:
        pairs = list(zip(*(test.column(self.columns[side]) for side in _SIDES[:2]), strict=True))
        wanted = {text for pair in pairs for text in pair}
        seen = {text for side in _SIDES[:2] for text in train.column(self.columns[side]) if text in wanted}
        again = sum(not seen.isdisjoint(pair) for pair in pairs)
        if not again:
            return []
        return [f"{again} of {len(test)} test rows have a text of the training rows: the figures are flattered by that"]

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> "Embedder":
        assert self.settings.pooling is not None
        return Embedder(load_body(asked.model, asked.dtype, asked.revision), self.settings.pooling)

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        some = train.select(subset(len(train), None, _SAMPLE, asked.seed))
        tokenize: Any = self.tokenizer
        sides = [tokenize(texts, verbose=False)["input_ids"] for texts in self._texts(some)]
        lengths = [max(map(len, row)) for row in zip(*sides, strict=True)]
        self.max_length = settle_length(self.settings.max_length, lengths, model.body, self.tokenizer, asked)

    def embed(self, model: TaskModel, texts: Sequence[str], side: Side = "text", batch: int = 64) -> Tensor:
        """The vectors of texts, (N, D) in fp32, normalised; with the prompt of queries, or else of documents."""
        only = Embeddings(self.tokenizer, {side: side}, self.settings, self.scores)
        only.max_length = self.max_length
        examples = only.encode(only.table_of(texts))
        device, was_training = next(model.parameters()).device, model.training
        model.eval()
        found = []
        with torch.no_grad():
            for start in range(0, len(texts), batch):
                rows = only.collate(examples, range(start, min(start + batch, len(texts))))
                found.append(model({name: tensor.to(device) for name, tensor in rows.items()})[:, 0])
        model.train(was_training)
        return torch.cat(found)

    # -- rows -------------------------------------------------------------------------------------------------------
    def _texts(self, table: Table) -> list[list[str]]:
        """The texts of each side with their prompts."""
        query, document = self.settings.query_prompt or "", self.settings.document_prompt or ""
        return [
            [(query if side == "text" else document) + text for text in table.column(self.columns[side])]
            for side in self._sides(table)
        ]

    def _numbers(self, table: Table) -> Tensor:
        """A number for each text, the same for texts that differ in case or white space only, (N, S)."""
        sides = [table.column(self.columns[side]) for side in self._sides(table)]
        return torch.tensor(duplicate_groups(joined(sides))).view(len(sides), -1).T

    def _scores(self, table: Table) -> Tensor:
        name = self.columns.get("score")
        if name not in table.columns:
            return torch.zeros(len(table))
        return torch.tensor([float(cast(float, number(value))) for value in table.column(name)])

    def encoding(self) -> Encoding:
        texts = [self.columns[side] for side in _SIDES if side in self.columns]
        return Encoding(
            columns=list(filter(None, [*texts, self.columns.get("score")])),
            settings={
                "sides": [side for side in _SIDES if side in self.columns],
                "prompts": [self.settings.query_prompt, self.settings.document_prompt],
                "max_length": self.max_length,
                "finds": self.finds,
            },
        )

    def complete(self, table: Table, examples: Examples) -> Examples:
        return replace(examples, targets=self._numbers(table)) if self.finds else examples

    def encode(self, table: Table) -> Examples:
        tokenize: Any = self.tokenizer
        sides = [tokenize(texts, truncation=True, max_length=self.max_length) for texts in self._texts(table)]
        inputs = [{str(s): side["input_ids"][i] for s, side in enumerate(sides)} for i in range(len(table))]
        cut = sum(any(side.encodings[i].overflowing for side in sides) for i in range(len(table)))
        targets = self._numbers(table) if self.finds else self._scores(table)
        return Examples(inputs, targets, [max(map(len, row.values())) for row in inputs], cut)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """All sides as rows of one batch, a side after the other: (S B, T)."""
        sides = list(examples.inputs[indices[0]])
        rows = [{"input_ids": examples.inputs[i][side]} for side in sides for i in indices]
        flat = Examples(rows, torch.empty(0), [len(row["input_ids"]) for row in rows])
        batch = padded(flat, range(len(rows)), {"input_ids": cast(int, self.tokenizer.pad_token_id or 0)})
        batch["targets"] = examples.targets[list(indices)]
        return batch

    # -- learning and judging ---------------------------------------------------------------------------------------
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """A sum over the rows.  CoSENT has one number for the batch, which counts for each of its rows."""
        targets, temperature, count = batch["targets"], self.settings.temperature, len(outputs)
        if self.finds:
            return contrastive_loss(outputs, targets, temperature, symmetric=self.settings.symmetric), count
        cosines = _cosines(outputs)
        if self.settings.loss == "cosent":
            return cosent_loss(cosines, targets, temperature) * count, count
        low, high = self.scores
        return F.mse_loss(cosines, (targets - low) / (high - low), reduction="sum"), count

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """The vectors (B, S, D), or where only the similarity of a pair counts, that (B,)."""
        return outputs if self.finds or outputs.shape[1] == 1 else _cosines(outputs)

    def _per_row(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        ranks = Search.of(answers, targets).ranks()
        return {"mrr@10": mrr_at(ranks, 10), **{f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 10)}}

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        if self.finds:
            return {name: float(values.mean()) for name, values in self._per_row(answers, targets).items()}
        from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

        if len(answers) < 2 or not answers.std() or not targets.std():  # what is all the same ranks nothing
            return {"spearman": 0.0, "pearson": 0.0}
        return {
            "spearman": float(spearman_corrcoef(answers, targets)),
            "pearson": float(pearson_corrcoef(answers, targets)),
        }

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        if not self.finds:
            return None
        values = self._per_row(answers, targets)[self.metric]
        return torch.stack([values, torch.ones_like(values)], dim=1)

    def value_of(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Queries whose document only one of two models finds first."""
        if not self.finds:
            return []
        searches = [Search.of(answers, targets) for answers in (base, tuned)]
        first = [search.ranks() == 1 for search in searches]
        documents = [text for side in self._sides(table)[1:] for text in table.column(self.columns[side])]
        queries = table.column(self.columns["text"])
        return [
            Example(
                text=queries[i],
                truth=documents[i],
                base=documents[searches[0].best(i)],
                tuned=documents[searches[1].best(i)],
                better="tuned" if first[1][i] else "base",
            )
            for i in (first[0] != first[1]).nonzero()[:, 0].tolist()
        ]

    # -- using a result ---------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        settings = {**asdict(self.settings), "max_length": self.max_length}
        return {
            "task": self.name,
            "columns": self.columns,
            "settings": settings,
            "scores": list(self.scores),
            "metric": self.metric,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        low, high = map(float, description["scores"])
        return cls(
            load_tokenizer(asked.model, asked.revision),
            {str(role): str(name) for role, name in description["columns"].items()},
            EmbeddingsSettings(**description["settings"]),
            (low, high),
            description["metric"],
        )

    def table_of(self, inputs: Sequence[str]) -> Table:
        side = next(iter(self.columns))
        return Table({self.columns[side]: list(inputs)}, [f"--text {i + 1}" for i in range(len(inputs))])

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        """Where nothing is judged, one side of the pair is enough: its vectors are shown."""
        self._is_judged = labelled
        if not labelled:
            self.columns = {role: name for role, name in self.columns.items() if name in table.columns}
            self.columns.pop("score", None)
        if not self._sides(table):
            raise DataError(f"no column of texts: {', '.join(table.names)}")

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        shown = {str(side): table.column(self.columns[side]) for side in self._sides(table)}
        rows = [{side: texts[i] for side, texts in shown.items()} for i in range(len(table))]
        if answers.ndim == 3 and answers.shape[1] == 1:
            return [{**row, "embedding": vector.tolist()} for row, vector in zip(rows, answers[:, 0], strict=True)]
        cosines = _cosines(answers) if answers.ndim == 3 else answers
        return [{**row, "similarity": round(float(c), 4)} for row, c in zip(rows, cosines, strict=True)]

    def save_body(self, body: nn.Module, folder: str) -> None:
        """So that sentence-transformers reads it too."""
        super().save_body(body, folder)
        prompts = {"query": self.settings.query_prompt or "", "document": self.settings.document_prompt or ""}
        assert self.settings.pooling is not None
        width = cast(Any, body).config.hidden_size
        save_trained(folder, self.settings.pooling, prompts, width=width, max_length=self.max_length)


def _cosines(vectors: Tensor) -> Tensor:
    return (vectors[:, 0] * vectors[:, 1]).sum(-1)


def _as_trained(settings: EmbeddingsSettings, asked: Asked) -> dict[str, Any]:
    """Pooling and prompts: as said, else as the model was trained; entered in the plan."""
    trained = settings.pooling or trained_pooling(asked.model, asked.revision)
    why = "as the model was trained" if trained else "usual for a model of this kind"
    pooling = trained or usual_pooling(asked.model, asked.revision)
    values: dict[str, Any] = {"pooling": asked.plan.decide("pooling", settings.pooling, pooling, why)}
    prompts = trained_prompts(asked.model, asked.revision)
    for name, keys in (("query_prompt", ("query",)), ("document_prompt", ("document", "passage"))):
        prompt = next((prompts[key] for key in keys if prompts.get(key)), "")
        said = getattr(settings, name)
        if said is not None or prompt:
            prompt = asked.plan.decide(name, said, prompt, "the model was trained with it")
        values[name] = prompt
    return values
