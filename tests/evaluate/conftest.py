"""Reports of the three shapes that runs have: two classes, twenty classes, regression."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from smidgen.evaluate.report import Estimate, Report, Row, ShiftRow
from smidgen.tasks.base import Example

MODEL = 11_171_074  # parameters


def make_row(name: str, value: float, half: float, **changed: Any) -> Row:
    sizes = {
        "majority": (0, 0),
        "mean": (0, 0),
        "base": (258, 1_800),
        "tuned": (34_562, 141_312),
        "full": (MODEL, 44_700_000),
    }
    trainable, disk_bytes = sizes[name]
    fields: dict[str, Any] = {
        "name": name,
        "value": value,
        "low": value - half,
        "high": value + half,
        "trainable": trainable,
        "share": trainable / MODEL,
        "peak_bytes": None if name in ("majority", "mean") else 412_000_000 + 8 * trainable,
        "seconds": 0.02
        if name in ("majority", "mean")
        else 11.4
        if name == "base"
        else 83.2
        if name == "tuned"
        else 412.0,
        "disk_bytes": disk_bytes,
        "others": {},
    }
    return Row(**{**fields, **changed})


def falling(start: float, end: float, steps: Sequence[int], wave: float = 0.0) -> list[tuple[int, float]]:
    return [
        (step, end + (start - end) * math.exp(-4 * step / steps[-1]) + wave * math.sin(step * 12.9898))
        for step in steps
    ]


def make_report(**changed: Any) -> Report:
    """A text classification with two labels that gained."""
    steps = range(100, 1001, 100)
    rising = [(step, value + 0.00014 * max(0, step - 500)) for step, value in falling(0.69, 0.41, steps)]
    fields: dict[str, Any] = {
        "metric": "accuracy",
        "higher_is_better": True,
        "task": "text_classification",
        "model": "prajjwal1/bert-mini",
        "data": "reviews.jsonl",
        "method": "LoRA(rank=8)",
        "rows": (
            make_row("majority", 0.521, 0.022, others={"macro_f1": 0.343, "mcc": 0.0}),
            make_row("base", 0.779, 0.018, others={"macro_f1": 0.778, "mcc": 0.558}),
            make_row("tuned", 0.841, 0.016, others={"macro_f1": 0.840, "mcc": 0.682}),
            make_row("full", 0.848, 0.016, others={"macro_f1": 0.847, "mcc": 0.696}),
        ),
        "difference": Estimate(0.062, 0.041, 0.083),
        "base_name": "linear probe",
        "curves": {
            "train loss": falling(0.70, 0.22, range(1, 1001), 0.05),
            "valid loss": rising,
            "valid accuracy": [(step, 1.25 - loss) for step, loss in rising],
        },
        "best_step": 500,
        "confusion": [[866, 176], [142, 816]],
        "labels": ["negative", "positive"],
        "shift": (
            ShiftRow(
                name="tweets",
                count=4200,
                base=Estimate(0.711, 0.697, 0.725),
                tuned=Estimate(0.683, 0.669, 0.697),
                difference=Estimate(-0.028, -0.044, -0.012),
            ),
            ShiftRow(
                name="news comments",
                count=1200,
                base=Estimate(0.702, 0.676, 0.728),
                tuned=Estimate(0.731, 0.706, 0.756),
                difference=Estimate(0.029, 0.008, 0.051),
            ),
        ),
        "plan": (
            ("rank", "8", "usual for a model of this size"),
            ("lr", "2e-4", "the largest of five that kept falling in 30 probe steps; ten times more diverged"),
            ("batch", "32", "fits in memory with a third to spare"),
        ),
        "notes": ("3 of 8,000 training rows were skipped: no text (reviews.jsonl:17, 902, 4411).",),
        "examples": (
            Example(
                text="Not half as bad as I feared. " * 9,
                truth="positive",
                base="negative",
                tuned="positive",
                better="tuned",
            ),
            Example(
                text="A fine film to sleep to.", truth="negative", base="positive", tuned="negative", better="tuned"
            ),
            Example(
                text="It grows on you, like moss.", truth="positive", base="positive", tuned="negative", better="base"
            ),
        ),
        "versions": {"smidgen": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
    }
    return Report(**{**fields, **changed})


def make_many_classes(classes: int = 20, **changed: Any) -> Report:
    """A classification with many labels and no certain gain."""
    labels = [f"intent {number}: " + "ask for something "[: 4 + number % 14] for number in range(classes)]
    confusion = [[93 if i == j else (i * 7 + j * 3) % 11 // 8 * 4 for j in range(classes)] for i in range(classes)]
    fields: dict[str, Any] = {"labels": labels, "confusion": confusion, "difference": Estimate(0.006, -0.011, 0.023)}
    return make_report(**{**fields, **changed})


def make_regression(**changed: Any) -> Report:
    """A regression that lost, judged by an error."""
    fields: dict[str, Any] = {
        "metric": "rmse",
        "higher_is_better": False,
        "task": "text_regression",
        "rows": (
            make_row("mean", 1.412, 0.031, others={"spearman": math.nan}),
            make_row("base", 0.871, 0.025, others={"spearman": 0.741}),
            make_row("tuned", 0.902, 0.027, others={"spearman": 0.722}),
        ),
        "difference": Estimate(0.031, 0.012, 0.049),
        "curves": {
            "train loss": falling(2.0, 0.8, range(10, 401, 10)),
            "valid loss": falling(2.0, 0.85, range(50, 401, 50)),
        },
        "best_step": 400,
        "confusion": None,
        "labels": (),
        "shift": (),
        "examples": (),
    }
    return make_report(**{**fields, **changed})


def make_entities(types: int = 18, **changed: Any) -> Report:
    """Entities of many types, with three figures of each."""
    kinds = [f"TYPE{number}" for number in range(types)]

    def others(start: float) -> dict[str, float]:
        by_type = {
            f"{name} {kind}": start + 0.01 * i for i, kind in enumerate(kinds) for name in ("precision", "recall", "f1")
        }
        return {"precision": start, "recall": start, "macro_f1": start, **by_type}

    fields: dict[str, Any] = {
        "metric": "f1",
        "task": "token_classification",
        "rows": (
            make_row("base", 0.612, 0.02, others=others(0.5)),
            make_row("tuned", 0.743, 0.02, others=others(0.6)),
            make_row("full", 0.751, 0.02, others=others(0.65)),
        ),
        "difference": Estimate(0.131, 0.11, 0.15),
        "confusion": None,
        "labels": (),
        "shift": (),
    }
    return make_report(**{**fields, **changed})


@pytest.fixture
def entities() -> Report:
    return make_entities()


@pytest.fixture
def binary() -> Report:
    return make_report()


@pytest.fixture
def many_classes() -> Report:
    return make_many_classes()


@pytest.fixture
def regression() -> Report:
    return make_regression()
