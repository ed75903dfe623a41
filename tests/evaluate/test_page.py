"""The page is well formed, asks nobody for anything, and takes hostile text as text."""

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from smidgen.evaluate.charts import ticks
from smidgen.evaluate.markup import element
from smidgen.evaluate.page import page
from smidgen.evaluate.report import Report
from smidgen.tasks.base import Example

HOSTILE = "</td><script>alert('1')</script>\"&amp;\x00\ud800"


def parsed(report: Report) -> ElementTree.Element:
    """The page as a tree: parsing it as XML is stricter than a browser, so a tag left open fails."""
    return ElementTree.fromstring(page(report).encode().removeprefix(b"<!DOCTYPE html>\n"))


def text_of(report: Report) -> str:
    return " ".join(" ".join(parsed(report).itertext()).split())


def headings(report: Report) -> list[str]:
    return [heading.text or "" for heading in parsed(report).iter("h2")]


def hostile(report: Report) -> Report:
    """The report with markup in every text that comes from a user."""
    count = len(report.labels)
    return replace(
        report,
        task=HOSTILE,
        model=HOSTILE,
        data=HOSTILE,
        method=HOSTILE,
        base_name=HOSTILE,
        metric=HOSTILE,
        labels=[f"{HOSTILE}{number}" for number in range(count)],
        curves={f"valid {HOSTILE}": [(1, 0.5), (2, 0.4)]},
        shift=tuple(replace(row, name=HOSTILE) for row in report.shift),
        plan=[(HOSTILE, HOSTILE, HOSTILE)],
        notes=[HOSTILE],
        examples=[Example(text=HOSTILE, truth=HOSTILE, base=HOSTILE, tuned=HOSTILE, better="base")],
        versions={HOSTILE: HOSTILE},
        rows=tuple(replace(row, others={HOSTILE: 0.5}) for row in report.rows),
    )


@pytest.mark.parametrize("kind", ["binary", "many_classes", "regression"])
def test_hostile_text_stays_text(kind: str, request: pytest.FixtureRequest) -> None:
    report = hostile(request.getfixturevalue(kind))
    tags = {node.tag for node in parsed(report).iter()}
    assert "script" not in tags
    assert "<script" not in page(report)
    assert "alert('1')" in text_of(report)


@pytest.mark.parametrize("kind", ["binary", "many_classes", "regression"])
def test_the_page_loads_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(kind)
    assert not re.search(r"https?:|url\(|@import|//", page(report))
    for node in parsed(report).iter():
        assert not {"src", "href", "onclick", "onload"} & node.attrib.keys()
    policy = next(node for node in parsed(report).iter("meta") if "http-equiv" in node.attrib)
    assert policy.attrib["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_opens_with_the_verdict(binary: Report) -> None:
    assert next(parsed(binary).iter("h1")).text == (
        "Tuned gains 6.2 points of accuracy over the linear probe [4.1, 8.3]."
    )


def test_every_section_that_has_something_is_there(binary: Report, regression: Report) -> None:
    always = ["What to know", "Results", "Cost", "Learning curves"]
    assert headings(regression) == [*always, "Plan", "Provenance"]
    assert headings(binary) == [
        *always,
        *("On other data", "Confusion matrix", "Where they differ", "Plan", "Provenance"),
    ]


def test_the_confusion_matrix_draws_each_cell_up_to_thirty_classes(many_classes: Report) -> None:
    [matrix] = [node for node in parsed(many_classes).iter("svg") if node.get("aria-label") == "confusion matrix"]
    titles = [node.text or "" for node in matrix.iter("title")]
    assert sum(title.startswith("truth ") for title in titles) == 20 * 20
    assert "truth intent 0: ask , predicted intent 0: ask : 93 (82.3 % of 113)" in titles


def test_more_than_thirty_classes_are_listed_as_the_most_confused_pairs(binary: Report) -> None:
    labels = [f"class {number}" for number in range(31)]
    counts = [[50 if i == j else 0 for j in range(31)] for i in range(31)]
    counts[3][7], counts[8][2] = 9, 12
    report = replace(binary, labels=labels, confusion=counts)
    assert "class 8 class 2 12 62 class 3 class 7 9 59" in text_of(report)
    assert "Confusion matrix" not in headings(report)


def test_the_best_step_is_marked_on_the_validation_curve(binary: Report) -> None:
    text = text_of(binary)
    assert "best: step 500" in text
    assert "best: step" not in text_of(replace(binary, best_step=None))


def test_a_curve_is_drawn_without_the_points_that_are_not_finite(binary: Report) -> None:
    report = replace(binary, curves={"train loss": [(1, 0.5), (2, math.nan), (3, 0.3)], "valid loss": [(2, math.inf)]})
    lines = [node.get("points") or "" for node in parsed(report).iter("polyline")]
    assert [len(line.split()) for line in lines] == [2]
    assert not re.search(r"\b(nan|inf)\b", page(report))


def test_long_curves_are_thinned_so_that_the_page_stays_small(binary: Report) -> None:
    report = replace(binary, curves={"train loss": [(step, 1 / step) for step in range(1, 100_001)]})
    assert len(page(report)) < 40_000


def test_figures_that_are_undefined_do_not_break_the_page(binary: Report) -> None:
    *others, full = binary.rows
    unknown = replace(full, value=math.nan, low=math.nan, high=math.nan, seconds=math.nan)
    report = replace(binary, rows=(unknown, *others))
    assert not re.search(r"\bnan\b", page(report))
    bars = [node for node in parsed(report).iter("svg") if node.get("class") == "bar"]
    assert len(bars) == 2  # base and tuned keep theirs


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.448, 0.485), (-3.0, 1200.0), (5.0, 5.0), (0.0, 0.0)])
def test_ticks_enclose_the_values_and_are_few(low: float, high: float) -> None:
    made = ticks(low, high)
    assert made[0] <= low <= high <= made[-1]
    assert 3 <= len(made) <= 7


def test_only_markup_is_trusted() -> None:
    inner = element("b", "<&>")
    assert element("p", "<i>", inner, data_label='"') == '<p data-label="&quot;">&lt;i&gt;<b>&lt;&amp;&gt;</b></p>'
