"""The row "base" of a run: the frozen model with a linear probe, judged, and where the tuned head starts."""

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..auto.linear_probe import Loss, Probe, fit_probe
from ..data.split import subset
from ..tasks.base import Batch, Examples, TaskModel
from ..training.loop import over_batches, predict
from ..training.memory import peak_memory, rows_at_once
from ..training.replay import Replay
from . import judge
from .choose import Chosen, agreed
from .prepare import Work

if TYPE_CHECKING:
    from accelerate import Accelerator

_MOST_NUMBERS = 1 << 27  # of the probe's features, half a gigabyte
_LEAST_ROWS = 2000  # that the probe is fitted on, whatever the time: it is the rival, and where the head starts


@dataclass(frozen=True)
class Base:
    """What the frozen model can do, and where the tuned head starts.   probe: None for the model as it is."""

    probe: Probe | None
    answers: judge.Answers
    size: int
    peak_bytes: int | None
    seconds: float
    notes: list[str]

    @property
    def name(self) -> str:
        return "untouched model" if self.probe is None else "linear probe"

    @torch.no_grad()
    def start(self, model: TaskModel) -> None:
        """Let the head start where the probe ends."""
        if self.probe is not None:
            head = cast(nn.Linear, model.head)
            head.weight.copy_(self.probe.weight)
            head.bias.copy_(self.probe.bias)


def fit_base(work: Work, chosen: Chosen, accelerator: "Accelerator", replay: Replay | None = None) -> Base:
    """Judge the frozen model on the test rows: with a linear probe fitted on its features of the training rows where
    the task has a fresh linear head, else as it is.   replay: is recorded on the way.
    """
    started = time.monotonic()
    notes: list[str] = []
    base = Base(None, judge.Answers(torch.empty(0), {}), 0, None, 0.0, notes)
    with peak_memory(accelerator.device) as peak:
        if work.task.probed:
            rows = _affordable(work, chosen, accelerator)
            if len(rows) < len(work.train):
                notes.append(
                    f"The linear probe was fitted on {len(rows):,} of {len(work.train):,} training "
                    "rows, what a third of the time and the memory allow."
                )
            features, targets, weights = _features(work, chosen, accelerator, rows, replay)
            outputs = cast(nn.Linear, work.model.head).out_features
            probe = fit_probe(features, targets, outputs, _mean_loss(work), seed=chosen.seed, weights=weights)
            base = replace(base, probe=probe, size=probe.weight.numel() + probe.bias.numel())
            base.start(work.model)
        answers = answers_of(work, chosen, accelerator, replay)
    return replace(base, answers=answers, peak_bytes=peak.size_bytes, seconds=time.monotonic() - started)


def answers_of(work: Work, chosen: Chosen, accelerator: "Accelerator", replay: Replay | None = None) -> judge.Answers:
    """The model's answers to the test rows and to each shift set."""

    def answers(examples: Examples) -> Tensor:
        rows = rows_at_once(2 * chosen.batch, chosen.split)
        return predict(work.model, work.task, examples, accelerator, rows, replay=replay).answers

    return judge.Answers(answers(work.test), {name: answers(examples) for name, examples in work.shift.items()})


def _features(
    work: Work, chosen: Chosen, accelerator: "Accelerator", rows: list[int], replay: Replay | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The features (M, D) of some training rows, their targets (M, ...) and weights (M,), in the order of the rows'
    batches.
    """
    some = work.train if len(rows) == len(work.train) else work.train.select(rows)
    beside = list[tuple[Tensor, Tensor | None]]()

    def features(batch: Batch) -> Tensor:
        weights = work.task.feature_weights(batch)
        beside.append((work.task.feature_targets(batch).cpu(), None if weights is None else weights.cpu()))
        return work.model.features(batch)

    rows_each = rows_at_once(2 * chosen.batch, chosen.split)
    found = over_batches(work.model, work.task, some, accelerator, rows_each, features, replay)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found, beside = gather_object(found), gather_object(beside)
    weights = [part for _, part in beside if part is not None]
    return (
        torch.cat([part for _, part in found]),
        torch.cat([part for part, _ in beside]),
        torch.cat(weights) if weights else None,
    )


def _affordable(work: Work, chosen: Chosen, accelerator: "Accelerator") -> list[int]:
    """The training rows whose features take at most a third of the time, and fit in memory; a sample by class where
    that is not all.
    """
    rows = subset(len(work.train), None, 4 * chosen.batch, chosen.seed)
    start = time.monotonic()
    features, *_ = _features(work, chosen, accelerator, rows)
    per_row = agreed((time.monotonic() - start) / len(rows))
    most = int(_MOST_NUMBERS * len(rows) / features.numel())
    if chosen.minutes is not None:
        fixed = len(work.test) + sum(map(len, work.shift.values()))
        most = min(most, max(int(60 * chosen.minutes / 3 / per_row) - fixed, _LEAST_ROWS))
    return subset(len(work.train), work.task.strata(work.data.train), most, chosen.seed)


def _mean_loss(work: Work) -> Loss:
    def loss(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        batch = {"targets": targets} if weights is None else {"targets": targets, "weights": weights}
        total, count = work.task.loss(outputs, batch)
        return total / count

    return loss
