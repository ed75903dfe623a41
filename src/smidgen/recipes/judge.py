"""What a run came to: each way of answering judged on the same rows, with intervals, and put together as the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..auto.plan import Plan
from ..evaluate.bootstrap import Metric, bootstrap_interval, paired_difference_interval
from ..evaluate.report import Estimate, Report, Row, ShiftRow
from ..tasks.base import Sample, Task
from ..training.loop import Outcome
from .prepare import Work

_SAMPLES = 4  # generated texts that are shown
_SEED = 0  # of the bootstrap's draws, the same for every model that is compared


@dataclass(frozen=True)
class Answers:
    """Answers of one model to the test rows and to each shift set."""

    test: Tensor
    shift: dict[str, Tensor]


@dataclass(frozen=True)
class Full:
    """What full fine-tuning came to.   curves: of its training, as `Outcome.curves`."""

    row: Row
    answers: Answers
    curves: Mapping[str, Sequence[tuple[int, float]]]


def row(
    name: str,
    work: Work,
    answers: Tensor,
    *,
    trainable: int,
    peak_bytes: int | None,
    seconds: float,
    disk_bytes: int,
) -> Row:
    """One line of the table."""
    estimate = _estimate(work.task, answers, work.test.targets)
    scores = work.task.score(answers, work.test.targets)
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


def constant(work: Work) -> Row | None:
    """The line of someone who knows only the training targets, if the task has such answers."""
    found = work.task.constant(work.train.targets, len(work.test))
    return found and row(found[0], work, found[1], trainable=0, peak_bytes=None, seconds=0.0, disk_bytes=0)


def said(work: Work) -> list[str]:
    """What the model says now to a few test rows, where it is one that generates."""
    return work.task.samples(work.model.eval(), work.data.test, _asked(work))


def _asked(work: Work) -> list[int]:
    """The first test rows that ask different things."""
    if type(work.task).samples is Task.samples:
        return []
    different: dict[str, int] = {}
    for row in range(len(work.data.test)):
        different.setdefault(work.task.prompt_of(work.data.test, row), row)
        if len(different) == _SAMPLES:
            break
    return list(different.values())


def samples(work: Work, base: Sequence[str], tuned: Sequence[str]) -> list[Sample]:
    """What base and tuned `said`, side by side."""
    task, table = work.task, work.data.test
    return [
        Sample(prompt=task.prompt_of(table, i), truth=task.truth_of(table, i), base=before, tuned=after)
        for i, before, after in zip(_asked(work), base, tuned, strict=True)
    ]


def report(
    work: Work,
    rows: Sequence[Row],
    base_name: str,
    base: Answers,
    tuned: Answers,
    full: Full | None,
    outcome: Outcome,
    plan: Plan,
    method: str,
    notes: Sequence[str],
    samples: Sequence[Sample],
    versions: Mapping[str, str],
) -> Report:
    """Everything that the run came to."""
    task = work.task
    shift = tuple(
        ShiftRow(
            name=name,
            count=len(examples),
            base=_estimate(task, base.shift[name], examples.targets),
            tuned=_estimate(task, tuned.shift[name], examples.targets),
            difference=difference(task, base.shift[name], tuned.shift[name], examples.targets),
            full=None if full is None else _estimate(task, full.answers.shift[name], examples.targets),
            full_difference=(
                None if full is None else difference(task, base.shift[name], full.answers.shift[name], examples.targets)
            ),
        )
        for name, examples in work.shift.items()
    )
    confusion = task.confusion(tuned.test, work.test.targets)
    return Report(
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        task=task.name,
        model=work.asked.model.name,
        data=work.recipe.data.train,
        method=method,
        rows=tuple(rows if full is None else [*rows, full.row]),
        difference=difference(task, base.test, tuned.test, work.test.targets),
        base_name=base_name,
        curves=outcome.curves,
        best_step=outcome.best_step,
        confusion=confusion and confusion[1],
        labels=confusion[0] if confusion else (),
        shift=shift,
        plan=plan.entries,
        notes=[*notes, *_remarks(work, outcome)],
        examples=task.contrasts(work.data.test, work.test.targets, base.test, tuned.test),
        samples=samples,
        versions=versions,
        over_full=None if full is None else difference(task, full.answers.test, tuned.test, work.test.targets),
        full_curves={} if full is None else full.curves,
    )


def _estimate(task: Task, answers: Tensor, targets: Tensor) -> Estimate:
    value = task.score(answers, targets)[task.metric]
    return Estimate(value, *interval(task, answers, targets))


def interval(task: Task, answers: Tensor, targets: Tensor) -> tuple[float, float]:
    """The 95 % interval of the task's metric."""
    parts = task.parts(answers, targets)
    if parts is not None:
        return bootstrap_interval(_of_parts(task), parts.double(), targets, seed=_SEED, resamples=task.resamples)
    return bootstrap_interval(_of_answers(task), answers, targets, seed=_SEED, resamples=task.resamples)


def difference(task: Task, base: Tensor, tuned: Tensor, targets: Tensor) -> Estimate:
    """Tuned minus base in the task's metric, paired."""
    before, after = (task.score(answers, targets)[task.metric] for answers in (base, tuned))
    parts = [task.parts(answers, targets) for answers in (tuned, base)]
    if parts[0] is not None and parts[1] is not None:
        metric, of_tuned, of_base = _of_parts(task), parts[0].double(), parts[1].double()
    else:
        metric, of_tuned, of_base = _of_answers(task), tuned, base
    ends = paired_difference_interval(metric, of_tuned, of_base, targets, seed=_SEED, resamples=task.resamples)
    return Estimate(after - before, *ends)


def _of_parts(task: Task) -> Metric:
    return lambda parts, _: float(task.value_of(parts.sum(0)))


def _of_answers(task: Task) -> Metric:
    return lambda answers, targets: task.score(answers, targets)[task.metric]


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
                f"{examples.truncated / len(examples):.0%} of the {name} rows were cut to "
                f"{work.task.max_length} tokens (--max-length)."
            )
    return remarks
