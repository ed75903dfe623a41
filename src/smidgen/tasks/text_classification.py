"""Text classification: one of several classes, several at once, or a number; for single texts and pairs.

The body is the pre-trained model as it is; the task adds a pooling and a linear head:

    z = mean over the tokens of h_t         encoders;     the last token's h in decoders, which look backwards
    outputs = W z + c                       W: (K, 2 D)   K = classes, or 1 for a number

h_t: hidden states of the middle and of the last layer side by side; the middle one often knows what the last forgot.

The head starts from the linear probe on the frozen body, so tuning starts where the probe ends (linear probing, then
fine-tuning: Kumar et al. 2022, arXiv:2202.10054).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Held
from ..core.errors import DataError, ModelError, RecipeError
from ..data.columns import Columns
from ..data.labels import Kind, Labels, check_text
from ..data.table import Table
from .base import Batch, Examples, Task, TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["mean", "last"]

_METRICS = {"regression": ("spearman", "r2", "mae"), "multilabel": ("macro_f1", "micro_f1", "exact_match")}
_METRICS_OF_CLASSES = ("accuracy", "macro_f1", "mcc")


@dataclass
class TextClassification(Task):
    """Text classification with a given tokenizer, labels and columns.

    max_length: tokens; longer texts are cut.   centre, spread: of the training targets of a regression, whose head
    predicts (target - centre) / spread.
    """

    tokenizer: "PreTrainedTokenizerBase"
    columns: Columns
    labels: Labels
    max_length: int
    label_smoothing: float = 0.0
    centre: float = 0.0
    spread: float = 1.0
    metric: str = field(init=False)

    name = "text_classification"

    def __post_init__(self) -> None:
        self.judge_by(self.metrics[0])

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that fit; the first is what counts where nobody says."""
        return _METRICS.get(self.labels.kind, _METRICS_OF_CLASSES)

    def judge_by(self, metric: str) -> None:
        """Compare and choose models by this metric.  Raises RecipeError if it does not fit."""
        if metric not in self.metrics:
            raise RecipeError(f'"{metric}" is no metric of {self.labels.kind}; there are: {", ".join(self.metrics)}')
        self.metric, self.higher_is_better = metric, metric != "mae"

    @property
    def outputs(self) -> int:
        """K: how many numbers the head gives."""
        return 1 if self.labels.kind == "regression" else len(self.labels.names)

    def check(self, table: Table) -> dict[int, str]:
        problems: dict[int, str] = {}
        for column in filter(None, (self.columns.text, self.columns.text_pair)):
            for i, value in enumerate(table.column(column)):
                if what := check_text(value):
                    problems[i] = f'column "{column}": {what}'
        if self.columns.label is not None:
            for i, value in enumerate(table.column(self.columns.label)):
                try:
                    self.labels.encode(value)
                except DataError as error:
                    problems[i] = f'column "{self.columns.label}": {error}'
        return problems

    def encode(self, table: Table) -> Examples:
        texts = table.column(self.columns.text)
        pairs = table.column(self.columns.text_pair) if self.columns.text_pair else None
        encoded = cast(Any, self.tokenizer)(texts, pairs, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        if pairs is None and "token_type_ids" in names:
            names.remove("token_type_ids")  # all zero: the model's own default
        inputs = [{name: encoded[name][i] for name in names} for i in range(len(table))]
        lengths = [len(row["input_ids"]) for row in inputs]
        cut = sum(bool(row.overflowing) for row in encoded.encodings or ())
        return Examples(inputs, self._targets(table), lengths, cut)

    def _targets(self, table: Table) -> Tensor:
        if self.columns.label is None or self.columns.label not in table.columns:
            return torch.zeros(len(table))
        values = [self.labels.encode(value) for value in table.column(self.columns.label)]
        dtype = torch.float32 if self.labels.kind in ("regression", "multilabel") else torch.int64
        return torch.tensor(values, dtype=dtype)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        width = max(examples.lengths[i] for i in indices)
        shape = (len(indices), width)
        batch: Batch = {"attention_mask": torch.zeros(shape, dtype=torch.int64)}
        for name in examples.inputs[0]:
            filler = cast(int, self.tokenizer.pad_token_id or 0) if name == "input_ids" else 0
            batch[name] = torch.full(shape, filler)
        for row, i in enumerate(indices):
            for name, values in examples.inputs[i].items():
                batch[name][row, : len(values)] = torch.tensor(values)
            batch["attention_mask"][row, : examples.lengths[i]] = 1
        batch["targets"] = examples.targets[list(indices)]
        return batch

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        targets, outputs = batch["targets"], outputs.float()
        if self.labels.kind == "regression":
            return F.mse_loss(outputs[:, 0], (targets - self.centre) / self.spread, reduction="sum"), len(targets)
        if self.labels.kind == "multilabel":
            loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
            return loss / outputs.shape[1], len(targets)
        return F.cross_entropy(outputs, targets, reduction="sum", label_smoothing=self.label_smoothing), len(targets)

    def predictions(self, outputs: Tensor) -> Tensor:
        """What the outputs say: class indices (N,), 0/1 per class (N, K), or numbers (N,)."""
        if self.labels.kind == "regression":
            return outputs[:, 0] * self.spread + self.centre
        return (outputs > 0).long() if self.labels.kind == "multilabel" else outputs.argmax(1)

    def named(self, prediction: Tensor) -> str | float | list[str]:
        """One prediction as the data would say it."""
        if self.labels.kind == "regression":
            return float(prediction)
        if self.labels.kind == "multilabel":
            return [name for name, on in zip(self.labels.names, prediction.tolist(), strict=True) if on]
        return self.labels.names[int(prediction)]

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.score(self.predictions(outputs), targets)

    def score(self, predictions: Tensor, targets: Tensor) -> dict[str, float]:
        """All metrics that fit, of predictions as `predictions` gives them."""
        from torchmetrics.functional import classification as C
        from torchmetrics.functional import mean_absolute_error, r2_score, spearman_corrcoef

        if self.labels.kind == "regression":
            rank = float(spearman_corrcoef(predictions, targets)) if len(predictions) > 1 else float("nan")
            return {
                "spearman": rank if rank == rank else 0.0,  # a constant prediction ranks nothing
                "r2": float(r2_score(predictions, targets)) if len(predictions) > 1 else float("nan"),
                "mae": float(mean_absolute_error(predictions, targets)),
            }
        count = len(self.labels.names)
        if self.labels.kind == "multilabel":
            whole = targets.long()
            return {
                "macro_f1": float(C.multilabel_f1_score(predictions, whole, count, average="macro")),
                "micro_f1": float(C.multilabel_f1_score(predictions, whole, count, average="micro")),
                "exact_match": float((predictions == whole).all(1).float().mean()),
            }
        return {
            "accuracy": float((predictions == targets).float().mean()),
            "macro_f1": float(C.multiclass_f1_score(predictions, targets, count, average="macro")),
            "mcc": float(C.multiclass_matthews_corrcoef(predictions, targets, count)),
        }

    def constant(self, targets: Tensor, count: int) -> Tensor:
        """What someone predicts who knows only the training targets: the usual class or classes, or
        the mean; `count` times.
        """
        if self.labels.kind == "regression":
            return targets.mean().expand(count).clone()
        if self.labels.kind == "multilabel":
            return (targets.mean(0) > 0.5).long().expand(count, -1).clone()
        return torch.full((count,), int(torch.bincount(targets).argmax()))

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "kind": self.labels.kind,
            "labels": list(self.labels.names),
            "columns": {k: v for k, v in asdict(self.columns).items() if k != "reasons"},
            "metric": self.metric,
            "max_length": self.max_length,
            "centre": self.centre,
            "spread": self.spread,
        }

    @staticmethod
    def from_description(description: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> "TextClassification":
        """The task of a saved adapter, for predicting and evaluating."""
        if description["kind"] not in get_args(Kind):
            raise ValueError(f"there is no kind {description['kind']!r}")
        task = TextClassification(
            tokenizer=tokenizer,
            columns=Columns(**description["columns"], reasons={}),
            labels=Labels(kind=cast(Kind, description["kind"]), names=tuple(description["labels"])),
            max_length=int(description["max_length"]),
            centre=float(description["centre"]),
            spread=float(description["spread"]),
        )
        task.judge_by(description["metric"])
        return task


class TextClassifier(TaskModel):
    """A pre-trained body, a pooling over its middle and last hidden states, and a linear head in fp32.

    The body's own dropout stays off: it slows short runs and brings nothing there; adapters have theirs.
    """

    def __init__(self, body: nn.Module, outputs: int) -> None:
        super().__init__()
        self.body = body
        config: Any = body.config
        self.pooling = pooling_for(config)
        self.head: nn.Linear = nn.Linear(2 * config.hidden_size, outputs, device=next(body.parameters()).device)

    def train(self, mode: bool = True) -> "TextClassifier":
        super().train(mode)
        self.body.eval()
        for module in self.body.modules():
            if isinstance(module, Held):
                module.train(mode)
        return self

    def features(self, batch: Batch) -> Tensor:
        """The pooled hidden states of the middle and the last layer, (N, 2 D) in fp32."""
        inputs = {name: value for name, value in batch.items() if name != "targets"}
        out = self.body(**inputs, output_hidden_states=True)
        middle = out.hidden_states[len(out.hidden_states) // 2]
        hidden = torch.cat([middle, out.last_hidden_state], dim=-1).float()  # (N, T, 2 D)
        mask = batch["attention_mask"]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weights = mask.to(hidden.dtype)[:, :, None]
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, batch: Batch) -> Tensor:
        return cast(Tensor, self.head(self.features(batch)))


def pooling_for(config: Any) -> Pooling:
    """How to pool the hidden states of a transformers body: by the mean, or by the last token where it looks backwards.

    Raises ModelError for encoder-decoders, which have no single sequence of hidden states.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder; text classification takes an encoder (BERT, "
            "DeBERTa ...) or a decoder (Llama, GPT-2 ...)"
        )
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    backwards = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    return "last" if backwards else "mean"
