"""What a run came to: every figure behind report.json and report.html, and the two files themselves.

A report is data. What the figures mean is said once, in `verdict.py`; how they look is said in `page.py`,
`terminal.py` and `card.py`, which all read the same report.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from smidgen.core.errors import require
from smidgen.core.files import atomic_write
from smidgen.evaluate.units import NONE, metric_and_part, metric_text
from smidgen.tasks.base import Example, Sample

FORMAT = 1
KINDS: tuple[Literal["tuned"], Literal["base"]] = ("tuned", "base")  # of examples: who is right
EXAMPLES = 10  # of each kind
EXAMPLE_CHARACTERS = 200


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the final table: one way of answering the task, and what it costs."""

    name: str  # "majority" | "mean" | "base" | "tuned" | "full"
    value: float  # of the report's metric on the test examples
    low: float
    high: float
    trainable: int  # parameters
    share: float  # of the model's parameters, 0 to 1
    peak_bytes: int | None  # memory while training; None where it was not measured
    seconds: float
    disk_bytes: int
    others: Mapping[str, float]  # further metrics by name: macro_f1, mcc ...


@dataclass(frozen=True, kw_only=True)
class ShiftRow:
    """The same models on another data set or domain. Without a base, `base` and the differences are None."""

    name: str
    count: int  # examples
    base: Estimate | None
    tuned: Estimate
    difference: Estimate | None  # tuned minus base, paired
    full: Estimate | None = None  # full fine-tuning, where it was compared with
    full_difference: Estimate | None = None  # full minus base, paired


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to. Raises ConfigError where the parts do not fit each other."""

    metric: str
    higher_is_better: bool
    task: str
    model: str
    data: str
    method: str
    rows: tuple[Row, ...]
    difference: Estimate | None  # tuned minus base, paired; None only if no base was judged
    base_name: str  # what the row "base" is, as one says it: "linear probe", "untouched model"
    curves: Mapping[str, Sequence[tuple[int, float]]]  # "train loss", "valid accuracy" ... -> (step, value)
    best_step: int | None  # the step whose adapter was kept
    confusion: Sequence[Sequence[int]] | None  # counts, rows = truth
    labels: Sequence[str]
    shift: tuple[ShiftRow, ...]
    plan: Sequence[tuple[str, str, str]]  # (setting, value, why)
    notes: Sequence[str]  # what the figures cannot say: skipped rows, stopped early ...
    examples: Sequence[Example]
    versions: Mapping[str, str]  # package -> version
    samples: Sequence[Sample] = ()  # what a model that generates says to a few test prompts
    over_full: Estimate | None = None  # tuned minus full, paired, where full fine-tuning was compared with
    full_curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # its own, as `curves`

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        require(len(set(names)) == len(names), f"A report has one row of each name; it got {names}.")
        require("tuned" in names, f'A report is about the row "tuned"; it got {names}.')
        require(
            (self.difference is not None) == ("base" in names),
            f'The difference of tuned and base goes with the row "base": rows {names}, difference {self.difference}.',
        )
        require(
            self.over_full is None or "full" in names,
            f'The difference of tuned and full fine-tuning goes with the row "full"; it got {names}.',
        )
        if self.confusion is not None:
            shape = [len(self.confusion), *{len(row) for row in self.confusion}]
            require(
                set(shape) == {len(self.labels)},
                f"The confusion matrix has one row and one column per label: {len(self.labels)} labels, sizes {shape}.",
            )

    def row(self, name: str) -> Row | None:
        """The row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def other_metrics(self) -> list[str]:
        """The names of further metrics of all rows of the data, in the order of the first row that has them."""
        return [name for name in self._others() if metric_and_part(name)[1] is None]

    def part_metrics(self) -> tuple[list[str], list[str]]:
        """Those of a part alone, as of one type of entities ("f1 PER"): the metrics, and the parts."""
        pairs = [pair for pair in map(metric_and_part, self._others()) if pair[1] is not None]
        return list(dict.fromkeys(metric for metric, _ in pairs)), list(dict.fromkeys(str(part) for _, part in pairs))

    def _others(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.others))

    @property
    def has_full_shift(self) -> bool:
        """Whether full fine-tuning was judged on other data too."""
        return any(row.full is not None for row in self.shift)

    def shown_examples(self, better: Literal["base", "tuned"]) -> list[Example]:
        """At most 10 examples on which `better` is right and the other wrong."""
        return [example for example in self.examples if example.better == better][:EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; what is not finite is None, and example texts are cut to 200 characters."""
        from smidgen.evaluate.verdict import findings, verdict  # here: a verdict reads a report

        examples = [asdict(e) | {"text": cut(e.text)} for kind in KINDS for e in self.shown_examples(kind)]
        fields = {
            "format": FORMAT,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "task": self.task,
            "model": self.model,
            "data": self.data,
            "method": self.method,
            "rows": [{**vars(row), "others": dict(row.others)} for row in self.rows],
            "difference": _estimate(self.difference),
            "over_full": _estimate(self.over_full),
            "outcome": verdict(self).outcome,
            "headline": verdict(self).headline,
            "base_name": self.base_name,
            "curves": self.curves,
            "full_curves": self.full_curves,
            "best_step": self.best_step,
            "confusion": self.confusion,
            "labels": self.labels,
            "shift": [
                {
                    "name": row.name,
                    "count": row.count,
                    "base": _estimate(row.base),
                    "tuned": _estimate(row.tuned),
                    "difference": _estimate(row.difference),
                    "full": _estimate(row.full),
                    "full_difference": _estimate(row.full_difference),
                }
                for row in self.shift
            ],
            "plan": [{"setting": setting, "value": value, "why": why} for setting, value, why in self.plan],
            "notes": [*findings(self), *self.notes],
            "examples": examples,
            "samples": [asdict(sample) for sample in self.samples],
            "versions": self.versions,
        }
        return {key: _plain(value) for key, value in fields.items()}

    def save(self, folder: str | Path) -> None:
        """Write report.json and report.html into `folder`, made if missing; each is there whole or as it was."""
        from smidgen.evaluate.page import page  # here: a page draws a report

        figures = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        drawn = page(self)  # both are made before either is written
        atomic_write(Path(folder) / "report.json", figures.encode())
        atomic_write(Path(folder) / "report.html", drawn.encode())


def other_text(row: Row, name: str) -> str:
    """The value of a further metric, "n/a" where the row has none."""
    return metric_text(name, row.others[name]) if name in row.others else NONE


def sample_texts(sample: Sample) -> tuple[str, str, str, str]:
    """Prompt, truth, what the base says, what the tuned model says."""
    return sample.prompt, sample.truth, sample.base, sample.tuned


def cut(text: str) -> str:
    """The text on one line, at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else line[: EXAMPLE_CHARACTERS - 3] + "..."


def _estimate(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate._asdict()


def _plain(value: Any) -> Any:
    """Lists, dicts and finite numbers; JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
