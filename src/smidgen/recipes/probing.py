"""The row "base" of a run: the frozen model with a linear probe, judged, and where the tuned head starts."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..auto.linear_probe import Loss, Probe, fit_probe
from ..data.split import subset
from ..tasks.base import Batch
from ..tasks.text_classification import TextClassifier
from ..training.loop import predict
from ..training.memory import peak_memory
from . import judge
from .choose import Chosen, agreed
from .prepare import Work

if TYPE_CHECKING:
    from accelerate import Accelerator

_LEAST_ROWS = 2000  # that the probe is fitted on, whatever the time: it is the rival, and where the head starts


@dataclass(frozen=True)
class Base:
    """The linear probe: the frozen model's answers, and where the tuned head starts."""

    probe: Probe
    answers: judge.Answers
    size: int
    peak_bytes: int | None
    seconds: float
    notes: list[str]

    @torch.no_grad()
    def start(self, model: TextClassifier) -> None:
        """Let the head start where the probe ends."""
        model.head.weight.copy_(self.probe.weight)
        model.head.bias.copy_(self.probe.bias)


def fit_base(work: Work, chosen: Chosen, accelerator: "Accelerator") -> Base:
    """Fit the probe on the frozen model's features of the training rows, and judge it on the test rows."""
    started = time.monotonic()
    model = _Features(work.model)
    rows = list(range(len(work.train)))
    notes: list[str] = []
    with peak_memory(accelerator.device) as peak:
        if chosen.minutes is not None:
            rows = _affordable(model, work, chosen, accelerator)
            if len(rows) < len(work.train):
                notes.append(
                    f"The linear probe was fitted on {len(rows):,} of {len(work.train):,} training "
                    "rows, what a third of the time allows."
                )
        some = work.train.select(rows)
        features = predict(model, work.task, some, accelerator, 2 * chosen.batch)
        probe = fit_probe(features, some.targets, work.task.outputs, _mean_loss(work), seed=chosen.seed)
        outputs = {
            name: probe(predict(model, work.task, e, accelerator, 2 * chosen.batch))
            for name, e in {"": work.test, **work.shift}.items()
        }
    answers = judge.answers(work, outputs.pop(""), outputs)
    size = probe.weight.numel() + probe.bias.numel()
    return Base(probe, answers, size, peak.size_bytes, time.monotonic() - started, notes)


def answers_of(work: Work, chosen: Chosen, accelerator: "Accelerator") -> judge.Answers:
    outputs = {
        name: predict(work.model, work.task, e, accelerator, 2 * chosen.batch)
        for name, e in {"": work.test, **work.shift}.items()
    }
    return judge.answers(work, outputs.pop(""), outputs)


class _Features(nn.Module):
    """The model up to its pooling, as a module that `predict` can call."""

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.features(batch)


def _affordable(model: nn.Module, work: Work, chosen: Chosen, accelerator: "Accelerator") -> list[int]:
    """The training rows whose features take at most a third of the time; a sample by class where that is not all."""
    rows = subset(len(work.train), None, 4 * chosen.batch, chosen.seed)
    start = time.monotonic()
    predict(model, work.task, work.train.select(rows), accelerator, 2 * chosen.batch)
    per_row = agreed((time.monotonic() - start) / len(rows))
    fixed = len(work.test) + sum(map(len, work.shift.values()))
    most = int(60 * (chosen.minutes or 0) / 3 / per_row) - fixed
    return subset(len(work.train), _strata(work), max(most, _LEAST_ROWS), chosen.seed)


def _strata(work: Work) -> list[Any] | None:
    return work.train.targets.tolist() if work.task.labels.kind in ("binary", "multiclass") else None


def _mean_loss(work: Work) -> Loss:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        total, count = work.task.loss(outputs, {"targets": targets})
        return total / count

    return loss
