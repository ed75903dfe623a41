"""What the figures of a report mean, in words: did tuning gain, what did it cost, what should the user know.

The paired interval of tuned minus base decides: all of it on the better side of zero is a gain, all on the worse side
a loss, and anything else is not certain, however large the difference looks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smidgen.evaluate.report import Estimate, Report, Row
from smidgen.evaluate.units import (
    bytes_text,
    difference_text,
    interval_text,
    is_share,
    metric_text,
    number_text,
    seconds_text,
    share_text,
)

Outcome = Literal["gained", "lost", "uncertain", "not compared"]

OVERFIT = 0.05  # a validation loss this much above its lowest is worth a note; less is noise

POINT = 0.01  # behind full fine-tuning by more than this, of a share or relative to another metric, is worth a note
BEHIND = "Tuned is behind full fine-tuning: "  # the note that says why begins with it


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether tuning paid, as an outcome, a sentence, and what it cost."""

    outcome: Outcome
    headline: str
    cost: str
    full: str | None  # how full fine-tuning compares, where it was run


def verdict(report: Report) -> Verdict:
    """The verdict on the row "tuned" against the row "base"."""
    tuned = _tuned(report)
    outcome = outcome_of(report.difference, report.higher_is_better)
    memory = "" if tuned.peak_bytes is None else f", peak memory {bytes_text(tuned.peak_bytes)}"
    cost = (
        f"{share_text(tuned.share)} of the parameters trained, {bytes_text(tuned.disk_bytes)} on disk, "
        f"{seconds_text(tuned.seconds)}{memory}"
    )
    full = report.row("full")
    return Verdict(
        outcome=outcome,
        headline=_headline(report, tuned, outcome),
        cost=cost,
        full=None
        if full is None
        else f"Full fine-tuning reaches {_value(report.metric, full)}{_beside_full(report)}: "
        f"{bytes_text(full.disk_bytes)} on disk, {seconds_text(full.seconds)}.",
    )


def outcome_of(difference: Estimate | None, higher_is_better: bool) -> Outcome:
    """What a paired difference of tuned minus base says."""
    if difference is None:
        return "not compared"
    gain = _gain(difference, higher_is_better)
    if gain.low > 0:
        return "gained"
    return "lost" if gain.high < 0 else "uncertain"


def findings(report: Report) -> list[str]:
    """What the user must know and the figures say by themselves."""
    tuned = _tuned(report)
    found = []
    if outcome_of(report.difference, report.higher_is_better) == "uncertain":
        found.append("The gain is not certain: the interval of the difference includes zero. More test rows narrow it.")
    for name, trivial in (("majority", "always answering the most frequent label"), ("mean", "answering the mean")):
        row = report.row(name)
        if row is not None and not _is_better(tuned.value, row.value, report.higher_is_better):
            found.append(f"Tuned is no better than {trivial} ({metric_text(report.metric, row.value)}).")
    found += _overfitting(report)
    found += _behind_full(report)
    is_probe = report.base_name != "untouched model"
    why = "what it learned does not carry over" if is_probe else "it forgot some of what the model could"
    for shift in report.shift:
        for name, difference in (("tuned", shift.difference), ("full fine-tuning", shift.full_difference)):
            if difference is not None and outcome_of(difference, report.higher_is_better) == "lost":
                loss = _gain(difference, not report.higher_is_better)
                by = difference_text(report.metric, loss.value)
                interval = interval_text(report.metric, loss.low, loss.high)
                found.append(f"On {shift.name} {name} is worse than the {report.base_name} by {by} {interval}: {why}.")
    return found


CONSTANT = {  # rows of those who know only the training targets
    "majority": "most frequent label",
    "mean": "mean of the targets",
    "popularity": "the most popular first",
}


def described(report: Report, name: str) -> str:
    """What a row of the results is, in a few words."""
    known = {"full": "full fine-tuning", **CONSTANT}
    return {**known, "base": report.base_name, "tuned": report.method}.get(name, "")


def _headline(report: Report, tuned: Row, outcome: Outcome) -> str:
    metric, base = report.metric, report.base_name
    if report.difference is None:
        return f"Tuned reaches {_value(metric, tuned)} {metric}; it was not compared with a base."
    gain = _gain(report.difference, report.higher_is_better)
    if outcome == "lost":
        gain = _gain(report.difference, not report.higher_is_better)  # said as a positive loss
    size = difference_text(metric, abs(gain.value))
    interval = interval_text(metric, gain.low, gain.high)
    if outcome == "uncertain":
        side = "better" if gain.value > 0 else "worse" if gain.value < 0 else "different"
        return f"No certain gain: tuned is {size} {side} in {metric} than the {base} {interval}."
    if outcome == "gained":
        what = f"gains {size} of {metric} over" if report.higher_is_better else f"lowers {metric} by {size} against"
        return f"Tuned {what} the {base} {interval}."
    what = f"loses {size} of {metric}" if report.higher_is_better else f"raises {metric} by {size}"
    return f"Tuned {what} against the {base} {interval}: keep the {base}."


def _beside_full(report: Report) -> str:
    """How full fine-tuning compares with tuned, to follow its value; nothing where it was not compared."""
    if report.over_full is None:
        return ""
    gain = _gain(report.over_full, not report.higher_is_better)  # of full over tuned
    side = "better" if gain.value > 0 else "worse"
    if gain.value < 0:
        gain = Estimate(-gain.value, -gain.high, -gain.low)  # said as a positive loss
    interval = interval_text(report.metric, gain.low, gain.high)
    if gain.value == 0:
        return f", as tuned does {interval}"
    certainly = "not certainly " if outcome_of(report.over_full, report.higher_is_better) == "uncertain" else ""
    return f", {certainly}{side} than tuned by {difference_text(report.metric, gain.value)} {interval}"


def _behind_full(report: Report) -> list[str]:
    """Why full fine-tuning is better, as far as curves and other data show, if it certainly is or by over a point."""
    full, outcome = report.row("full"), outcome_of(report.over_full, report.higher_is_better)
    if report.over_full is None or full is None or outcome == "gained":
        return []
    behind = _gain(report.over_full, not report.higher_is_better)
    if outcome == "uncertain" and not behind.value > POINT * (1 if is_share(report.metric) else abs(full.value)):
        return []
    reasons, mine, its = [], _end(report.curves), _end(report.full_curves)
    if outcome == "uncertain":
        interval = interval_text(report.metric, behind.low, behind.high)
        reasons.append(f"not certainly, for the interval includes zero {interval}")
    judged = next((points for name, points in report.curves.items() if name == f"valid {report.metric}"), ())
    if judged and report.best_step == judged[-1][0]:
        reasons.append("it was at its best when its steps ended, so more of them may close the gap")
    if mine is not None and its is not None:
        losses = f"training loss {number_text(mine)}, and {number_text(its)} of full fine-tuning"
        if _rises(its, mine):
            helps = "more parameters may help, or less dropout where it has any"
            reasons.append(f"it fits the training rows less closely ({losses}): {helps}")
        else:
            reasons.append(f"it fits the training rows as closely ({losses}), and less of that carries over")
    for shift in report.shift:
        if shift.full is not None and _is_ahead(shift.tuned, shift.full, report.higher_is_better):
            kept = [metric_text(report.metric, each.value) for each in (shift.tuned, shift.full)]
            reasons.append(f"on {shift.name} it is ahead ({kept[0]}, full fine-tuning {kept[1]})")
    return [f"{BEHIND}{'; '.join(reasons)}."] if reasons else []


def _end(curves: Mapping[str, Sequence[tuple[int, float]]]) -> float | None:
    """The mean training loss of the last quarter of the points."""
    points = [value for _, value in curves.get("train loss", ()) if math.isfinite(value)]
    last = points[-max(1, len(points) // 4) :]
    return sum(last) / len(last) if last else None


def _overfitting(report: Report) -> list[str]:
    points = [point for point in report.curves.get("valid loss", ()) if math.isfinite(point[1])]
    if not points:
        return []
    best_step, best = min(points, key=lambda point: point[1])
    last_step, last = points[-1]
    if not _rises(best, last) or not _falls(report.curves.get("train loss", ()), best_step):
        return []
    kept = "" if report.best_step is None else f" The adapter kept is that of step {report.best_step:,}."
    return [
        f"Overfitting: the validation loss rose from {number_text(best)} (step {best_step:,}) to {number_text(last)} "
        f"(step {last_step:,}) while the training loss fell.{kept}"
    ]


def _rises(best: float, last: float) -> bool:
    return last - best > OVERFIT * abs(best)


def _falls(curve: Sequence[tuple[int, float]], since: int) -> bool:
    """Whether the mean of what follows the step `since` lies below the mean of as many points before it."""
    after = [value for step, value in curve if step > since]
    before = [value for step, value in curve if step <= since][-len(after) :] if after else []
    return bool(before) and sum(after) / len(after) < sum(before) / len(before)


def _tuned(report: Report) -> Row:
    return next(row for row in report.rows if row.name == "tuned")


def _is_better(a: float, b: float, higher_is_better: bool) -> bool:
    return a > b if higher_is_better else a < b


def _is_ahead(one: Estimate, other: Estimate, higher_is_better: bool) -> bool:
    """Whether all of one's interval is better than all of the other's."""
    return one.low > other.high if higher_is_better else one.high < other.low


def _gain(difference: Estimate, higher_is_better: bool) -> Estimate:
    """The difference turned so that above zero is better."""
    return difference if higher_is_better else Estimate(-difference.value, -difference.high, -difference.low)


def _value(metric: str, row: Row) -> str:
    return f"{metric_text(metric, row.value)} {interval_text(metric, row.low, row.high)}"
