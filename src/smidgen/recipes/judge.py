"""What a run came to: each way of answering judged on the same rows, with intervals, and put together as the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..auto.plan import Plan
from ..evaluate.bootstrap import bootstrap_interval, paired_difference_interval
from ..evaluate.report import Estimate, Example, Report, Row, ShiftRow
from ..training.loop import Outcome
from .prepare import Work

_SEED = 0  # of the bootstrap's draws, the same for every model that is compared


@dataclass(frozen=True)
class Answers:
    """Predictions of one model on the test rows and on each shift set."""

    test: Tensor
    shift: dict[str, Tensor]


def answers(work: Work, test_outputs: Tensor, shift_outputs: Mapping[str, Tensor]) -> Answers:
    """Predictions from outputs."""
    predictions = work.task.predictions
    return Answers(predictions(test_outputs), {name: predictions(outputs) for name, outputs in shift_outputs.items()})


def row(
    name: str,
    work: Work,
    predictions: Tensor,
    *,
    trainable: int,
    peak_bytes: int | None,
    seconds: float,
    disk_bytes: int,
) -> Row:
    """One line of the table."""
    estimate = _estimate(work, predictions, work.test.targets)
    scores = work.task.score(predictions, work.test.targets)
    return Row(
        name=name,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        trainable=trainable,
        share=trainable / work.total_parameters,
        peak_bytes=peak_bytes,
        seconds=seconds,
        disk_bytes=disk_bytes,
        others={metric: value for metric, value in scores.items() if metric != work.task.metric},
    )


def majority(work: Work) -> Row:
    """The line of someone who knows only the training targets."""
    name = "mean" if work.task.labels.kind == "regression" else "majority"
    predictions = work.task.constant(work.train.targets, len(work.test))
    return row(name, work, predictions, trainable=0, peak_bytes=None, seconds=0.0, disk_bytes=0)


def report(
    work: Work,
    rows: Sequence[Row],
    base: Answers,
    tuned: Answers,
    outcome: Outcome,
    plan: Plan,
    method: str,
    notes: Sequence[str],
    versions: Mapping[str, str],
) -> Report:
    """Everything that the run came to."""
    task = work.task
    shift = tuple(
        ShiftRow(
            name=name,
            count=len(examples),
            base=_estimate(work, base.shift[name], examples.targets),
            tuned=_estimate(work, tuned.shift[name], examples.targets),
            difference=_difference(work, base.shift[name], tuned.shift[name], examples.targets),
        )
        for name, examples in work.shift.items()
    )
    return Report(
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        task=task.name,
        model=work.located.name,
        data=work.recipe.data.train,
        method=method,
        rows=tuple(rows),
        difference=_difference(work, base.test, tuned.test, work.test.targets),
        base_name="linear probe",
        curves=outcome.curves,
        best_step=outcome.best_step,
        confusion=_confusion(work, tuned.test),
        labels=task.labels.names,
        shift=shift,
        plan=plan.entries,
        notes=[*notes, *_remarks(work, outcome)],
        examples=_examples(work, base.test, tuned.test),
        versions=versions,
    )


def _score(work: Work, predictions: Tensor, targets: Tensor) -> float:
    return work.task.score(predictions, targets)[work.task.metric]


def _fast_score(work: Work, predictions: Tensor, targets: Tensor) -> float:
    """The metric alone; the bootstrap asks a thousand times."""
    if work.task.metric == "accuracy":
        return float((predictions == targets).float().mean())
    return _score(work, predictions, targets)


def _estimate(work: Work, predictions: Tensor, targets: Tensor) -> Estimate:
    low, high = bootstrap_interval(lambda p, t: _fast_score(work, p, t), predictions, targets, seed=_SEED)
    return Estimate(_score(work, predictions, targets), low, high)


def _difference(work: Work, base: Tensor, tuned: Tensor, targets: Tensor) -> Estimate:
    low, high = paired_difference_interval(lambda p, t: _fast_score(work, p, t), tuned, base, targets, seed=_SEED)
    return Estimate(_score(work, tuned, targets) - _score(work, base, targets), low, high)


def _confusion(work: Work, predictions: Tensor) -> list[list[int]] | None:
    if work.task.labels.kind not in ("binary", "multiclass"):
        return None
    count = len(work.task.labels.names)
    pairs = work.test.targets * count + predictions
    return [[int(n) for n in line] for line in torch.bincount(pairs, minlength=count * count).view(count, count)]


def _examples(work: Work, base: Tensor, tuned: Tensor) -> list[Example]:
    """Rows on which exactly one of the two is right."""
    if work.task.labels.kind == "regression":
        return []
    task, targets = work.task, work.test.targets
    right = [(p == targets) if p.ndim == 1 else (p == targets).all(1) for p in (base, tuned)]
    texts = work.data.test.column(task.columns.text)
    found = []
    for i in (right[0] != right[1]).nonzero()[:, 0].tolist():
        truth, by_base, by_tuned = (str(task.named(p[i])) for p in (targets, base, tuned))
        better = "tuned" if right[1][i] else "base"
        found.append(Example(text=texts[i], truth=truth, base=by_base, tuned=by_tuned, better=better))  # type: ignore[arg-type]
    return found


def _remarks(work: Work, outcome: Outcome) -> list[str]:
    remarks = []
    if outcome.stopped == "early":
        remarks.append(
            f"Stopped early at step {outcome.step}: the validation {work.task.metric} did not get "
            f"better any more; step {outcome.best_step} was kept."
        )
    for name, examples in (("training", work.train), ("test", work.test)):
        if examples.truncated > 0.1 * len(examples):
            remarks.append(
                f"{examples.truncated / len(examples):.0%} of the {name} texts were cut to "
                f"{work.task.max_length} tokens (--max-length)."
            )
    return remarks
