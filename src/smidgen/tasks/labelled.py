"""What classification and regression share, whatever the rows are: one of several classes, several at once, a number.

The model gives outputs (N, K), K = classes, or 1 for a number; they are the answers too.

    loss = sum over rows of  w_row w_class l(outputs, target)       w_row: the column "weight", 1 on average
                                                                     w_class: N / (K N_class) with `balance`, else 1

What other columns say of rows, groups, times and weights: row_roles.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import DataError, RecipeError
from ..data.labels import Kind, Labels
from ..data.table import Table
from .base import Asked, Encoding, Example
from .judging import contrasted, counted
from .row_roles import ROW_ROLES, RowRoles, TaskWithRoles

_METRICS = {"regression": ("spearman", "r2", "mae"), "multilabel": ("macro_f1", "micro_f1", "exact_match")}
_METRICS_OF_CLASSES = ("accuracy", "macro_f1", "mcc")


class LabelledTask(TaskWithRoles):
    """A task whose rows have one label each, of any kind.   roles: the first is what a row is shown by.

    label_column: None where rows are only to be predicted.   centre, spread: of the training targets of a regression,
    whose head predicts (target - centre) / spread.
    """

    metrics_below = frozenset({"mae"})
    probed = True
    smooths = True

    labels: Labels
    label_column: str | None
    balance: bool = False
    class_weights: Tensor | None = None
    centre: float = 0.0
    spread: float = 1.0

    def set_labels(self, labels: Labels, metric: str | None) -> None:
        """Take the labels, and what is compared by."""
        self.labels = labels
        self.metrics = _METRICS.get(labels.kind, _METRICS_OF_CLASSES)
        self.judge_by(metric)

    @property
    def kind_name(self) -> str:
        return self.labels.kind

    @property
    def outputs(self) -> int:
        """K: how many numbers the head gives."""
        return 1 if self.labels.kind == "regression" else len(self.labels.names)

    def shown_input(self, table: Table, i: int) -> str:
        """Row i in words."""
        raise NotImplementedError

    def take_rows(self, train: Table, asked: Asked, balance: bool) -> None:
        """Take what is said of rows beside their labels.  Raises DataError or RecipeError."""
        self._understood = train
        self.take_roles(RowRoles.said(train, asked, ROW_ROLES), by_class=True)
        if balance and self.labels.kind not in ("binary", "multiclass"):
            raise RecipeError(f"task.balance is for rows of one class each, and the labels are {self.labels.kind}")
        self.balance = balance

    def check_rows(self, table: Table) -> dict[int, str]:
        """What is wrong with the labels of rows, and with their times, groups and weights.

        Of the very rows that the labels were understood from, those are wrong too whose label is unlike the others.
        """
        problems = self.beside.check(table)
        if self.label_column is not None:
            for i, value in enumerate(table.column(self.label_column)):
                try:
                    self.labels.encode(value)
                except DataError as error:
                    problems[i] = f'column "{self.label_column}": {error}'
        outliers = self.labels.problems if self.label_column is not None and table is self._understood else {}
        return {**{i: f'column "{self.label_column}": {what}' for i, what in outliers.items()}, **problems}

    _understood: Table | None = None  # the table that the labels were understood from

    def strata(self, table: Table) -> Sequence[Any] | None:
        if self.label_column is None:
            return None
        labels = table.column(self.label_column)
        if self.labels.kind == "regression":
            return [float(cast(float, self.labels.encode(value))) for value in labels]
        return [str(value) for value in labels] if self.labels.kind == "multilabel" else labels

    def targets_of(self, table: Table) -> Tensor:
        """(N,) class indices or numbers, (N, K) for several classes at once; zeros where there is no label."""
        if self.label_column is None or self.label_column not in table.columns:
            return torch.zeros(len(table))
        values = [self.labels.encode(value) for value in table.column(self.label_column)]
        dtype = torch.float32 if self.labels.kind in ("regression", "multilabel") else torch.int64
        return torch.tensor(values, dtype=dtype)

    def learn_from(self, train: Table) -> None:
        """Let the head of a regression predict in units of the training targets, and let rare classes weigh more."""
        self.beside = self.beside.learned(train)
        targets = self.targets_of(train)
        if self.balance:
            counts = torch.bincount(targets, minlength=len(self.labels.names))
            self.class_weights = len(targets) / (len(counts) * counts.clamp_min(1))
        if self.labels.kind == "regression":
            self.centre, self.spread = float(targets.mean()), max(float(targets.std(correction=0)), 1e-6)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        targets, outputs = batch["targets"], outputs.float()
        if self.labels.kind == "regression":
            losses = F.mse_loss(outputs[:, 0], (targets - self.centre) / self.spread, reduction="none")
        elif self.labels.kind == "multilabel":
            losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
        else:
            losses = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weights is not None:
            losses = losses * self.class_weights.to(targets.device)[targets]
        if "weights" in batch:
            losses = losses * batch["weights"]
        return losses.sum(), len(targets)

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

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        from torchmetrics.functional import classification as C
        from torchmetrics.functional import mean_absolute_error, r2_score, spearman_corrcoef

        predictions = self.predictions(answers)
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

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        """Of accuracy and exact match: whether a row is right; of mae its error.  Each beside a 1 that counts rows."""
        predictions = self.predictions(answers)
        if self.metric == "mae":
            right = (predictions - targets).abs()
        elif self.metric in ("accuracy", "exact_match"):
            right = _equal(predictions, targets).float()
        else:
            return None
        return counted(right)

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """The usual class or classes, or the mean."""
        if self.labels.kind == "regression":
            return "mean", ((targets.mean() - self.centre) / self.spread).expand(count, 1).clone()
        if self.labels.kind == "multilabel":
            return "majority", (targets.mean(0) - 0.5).expand(count, -1).clone()
        usual = torch.bincount(targets, minlength=len(self.labels.names)).argmax()
        return "majority", F.one_hot(usual, len(self.labels.names)).float().expand(count, -1).clone()

    def confusion(self, answers: Tensor, targets: Tensor) -> tuple[Sequence[str], list[list[int]]] | None:
        if self.labels.kind not in ("binary", "multiclass"):
            return None
        count = len(self.labels.names)
        pairs = torch.bincount(targets * count + self.predictions(answers), minlength=count * count)
        return self.labels.names, [[int(n) for n in line] for line in pairs.view(count, count)]

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        if self.labels.kind == "regression":
            return []
        said = (targets, self.predictions(base), self.predictions(tuned))

        def words(i: int) -> tuple[str, str, str, str]:
            truth, by_base, by_tuned = (str(self.named(some[i])) for some in said)
            return self.shown_input(table, i), truth, by_base, by_tuned

        return contrasted(_equal(said[1], targets), _equal(said[2], targets), words)

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        lines = []
        for i, prediction in enumerate(self.predictions(answers)):
            line: dict[str, Any] = {self.roles[0]: self.shown_input(table, i), "prediction": self.named(prediction)}
            if self.labels.kind in ("binary", "multiclass"):
                line["probability"] = round(float(answers[i].softmax(0).max()), 4)
            lines.append(line)
        return lines

    def encoding_with_labels(self, columns: Sequence[str | None], settings: Mapping[str, Any]) -> Encoding:
        """`encoding` by these columns, None for none, and settings, and by the labels and weights of rows."""
        about = {"kind": self.labels.kind, "labels": self.labels.names}
        return self.beside.encoding((*columns, self.label_column), {**settings, **about})

    def describe_labels(self) -> dict[str, Any]:
        """The part of `describe` that is about labels."""
        return {
            "task": self.name,
            "kind": self.labels.kind,
            "labels": list(self.labels.names),
            "metric": self.metric,
            "centre": self.centre,
            "spread": self.spread,
        }

    def take_scale(self, description: Mapping[str, Any]) -> None:
        """The numbers of `describe_labels`, the other way."""
        self.centre, self.spread = float(description["centre"]), float(description["spread"])


def labels_in(description: Mapping[str, Any]) -> Labels:
    """The labels of `describe_labels`, the other way.  Raises as `from_description`."""
    if description["kind"] not in get_args(Kind):
        raise ValueError(f"there is no kind {description['kind']!r}")
    return Labels(kind=cast(Kind, description["kind"]), names=tuple(map(str, description["labels"])))


def _equal(predictions: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool: the whole row is right."""
    same = predictions == targets
    return same if same.ndim == 1 else same.all(1)
