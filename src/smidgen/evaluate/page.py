"""report.html: the whole report on one page that asks nobody for anything: no script, no font, no picture.

The content security policy at its head forbids what we do not use, so not even a slip of ours could load something.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from smidgen.evaluate.charts import Curve, confusion_matrix, interval_bar, learning_curves
from smidgen.evaluate.markup import Markup, element, join
from smidgen.evaluate.report import KINDS, Estimate, Report, Row, ShiftRow, cut, other_text, sample_texts
from smidgen.evaluate.style import STYLE
from smidgen.evaluate.units import (
    NONE,
    bytes_text,
    difference_text,
    interval_text,
    metric_text,
    seconds_text,
    share_text,
)
from smidgen.evaluate.verdict import CONSTANT, described, findings, outcome_of, verdict
from smidgen.tasks.base import Example

MOST_CLASSES = 30  # in a drawn confusion matrix; above, the most confused pairs are listed
MOST_PAIRS = 20

OUTCOMES = {"gained": "Gained", "lost": "Lost", "uncertain": "Not certain", "not compared": "Not compared"}


def page(report: Report) -> str:
    """The report as one HTML document."""
    title = f"{report.method} on {report.data}: {report.metric}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    sections = (
        _header(report),
        _notes([*findings(report), *report.notes]),
        _results(report),
        _parts(report),
        _curves(report),
        _shift(report),
        _confusion(report.confusion, report.labels),
        _samples(report),
        _examples(report),
        _plan(report),
        _provenance(report),
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', *sections), lang='en')}\n"


def _header(report: Report) -> Markup:
    said = verdict(report)
    return element(
        "header",
        element("p", f"{_words(report.task)} / {report.model} / {report.method} / {report.data}", class_="kicker"),
        element("h1", said.headline),
        element("p", element("span", f"{OUTCOMES[said.outcome]}. ", class_="outcome"), f"Cost: {said.cost}."),
        *([] if said.full is None else [element("p", said.full, class_="soft")]),
        element("p", "Brackets are 95 % bootstrap intervals over the test examples.", class_="soft small"),
        class_=said.outcome,
    )


def _notes(notes: Sequence[str]) -> Markup:
    if not notes:
        return Markup("")
    return element("section", _title("What to know"), element("div", _list(notes), class_="notes"))


def _results(report: Report) -> Markup:
    judged = [row for row in report.rows if row.name not in CONSTANT]  # these would squeeze the others
    ends = [end for row in judged for end in (row.low, row.high) if math.isfinite(end)] or [0.0]
    start, end = min(ends), max(ends)
    others = report.other_metrics()

    def name_of(row: Row) -> Markup:
        return join(row.name, element("span", described(report, row.name), class_="sub"))

    def quality(row: Row) -> list[tuple[str, str]]:
        strong = row.name == "tuned"
        bar = interval_bar(row.value, row.low, row.high, start, end, strong=strong) if row in judged else ""
        return [
            ("", name_of(row)),
            ("num", _estimate(report.metric, Estimate(row.value, row.low, row.high))),
            ("bars", bar),
            *(("num", other_text(row, name)) for name in others),
        ]

    def cost(row: Row) -> list[tuple[str, str]]:
        return [
            ("", name_of(row)),
            ("num", f"{row.trainable:,}"),
            ("num", share_text(row.share)),
            ("num", bytes_text(row.peak_bytes)),
            ("num", seconds_text(row.seconds)),
            ("num", bytes_text(row.disk_bytes)),
        ]

    costs = ["", "parameters trained", "share of the model", "peak memory", "time", "on disk"]
    return element(
        "section",
        _title("Results"),
        _table(["", report.metric, "", *others], [(row.name, quality(row)) for row in report.rows]),
        _title("Cost"),
        _table(costs, [(row.name, cost(row)) for row in report.rows]),
    )


def _parts(report: Report) -> Markup:
    metrics, parts = report.part_metrics()
    if not parts:
        return Markup("")
    columns = [(metric, row) for metric in metrics for row in report.rows]
    rows = [
        ("", [("", part), *(("num", other_text(row, f"{metric} {part}")) for metric, row in columns)]) for part in parts
    ]
    table = _table(["", *(f"{metric} {row.name}" for metric, row in columns)], rows)
    return element("section", _title("By part"), table)


def _curves(report: Report) -> Markup:
    groups: dict[str, dict[str, Curve]] = {}  # "train loss" and "valid loss" share the axis "loss"
    for name, curve in sorted(report.curves.items(), key=lambda item: not item[0].startswith("valid")):
        groups.setdefault(name.split()[-1] if name else name, {})[name] = curve
    drawn = [
        learning_curves(_words(title), curves, report.best_step, partial(metric_text, title))
        for title, curves in sorted(groups.items(), key=lambda item: item[0] != "loss")
    ]
    drawn = [chart for chart in drawn if chart]
    return (
        element("section", _title("Learning curves"), element("div", *drawn, class_="charts")) if drawn else Markup("")
    )


def _shift(report: Report) -> Markup:
    if not report.shift:
        return Markup("")

    full = [f"full {report.metric}"] if report.has_full_shift else []

    def cells(row: ShiftRow) -> list[tuple[str, str]]:
        change = NONE
        if row.difference is not None:
            sign = "+" if row.difference.value > 0 else ""
            change = sign + difference_text(report.metric, row.difference.value)
        return [
            ("", row.name),
            ("num", f"{row.count:,}"),
            ("num", _estimate(report.metric, row.base)),
            *(("num", _estimate(report.metric, row.full)) for _ in full),
            ("num", _estimate(report.metric, row.tuned)),
            ("num", _change(change, report.metric, row.difference)),
            ("", OUTCOMES[outcome_of(row.difference, report.higher_is_better)].lower()),
        ]

    names = ["data", "examples", f"base {report.metric}", *full, f"tuned {report.metric}", "tuned minus base", ""]
    table = _table(names, [("", cells(row)) for row in report.shift])
    return element("section", _title("On other data"), table)


def _confusion(counts: Sequence[Sequence[int]] | None, labels: Sequence[str]) -> Markup:
    if counts is None or not labels:
        return Markup("")
    if len(labels) <= MOST_CLASSES:
        about = "Rows are the truth. Shaded by the share of the row: blue is right, red is wrong."
        drawing = element("div", confusion_matrix(counts, labels), class_="scroll")
        return element("section", _title("Confusion matrix"), element("p", about, class_="soft small"), drawing)
    pairs = sorted(
        ((count, row, column) for row, line in enumerate(counts) for column, count in enumerate(line) if row != column),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    rows = [
        ("", [("", labels[row]), ("", labels[column]), ("num", f"{count:,}"), ("num", f"{sum(counts[row]):,}")])
        for count, row, column in pairs[:MOST_PAIRS]
        if count
    ]
    table = _table(["truth", "predicted as", "examples", "of"], rows)
    about = f"The most confused pairs of {len(labels)} labels."
    return element("section", _title("Confusion"), element("p", about, class_="soft small"), table)


def _samples(report: Report) -> Markup:
    if not report.samples:
        return Markup("")
    rows = [
        ("", [(kind, cut(text)) for kind, text in zip(("long", "", "", ""), sample_texts(sample), strict=True)])
        for sample in report.samples
    ]
    return element("section", _title("What they say"), _table(["prompt", "truth", "base", "tuned"], rows))


def _examples(report: Report) -> Markup:
    def cells(example: Example) -> list[tuple[str, str]]:
        answers = [("", example.truth), ("", example.base), ("", example.tuned)]
        return [("long", cut(example.text)), *((kind, cut(text)) for kind, text in answers)]

    parts = []
    titles = {"tuned": "Tuned is right, base is wrong", "base": "Base is right, tuned is wrong"}
    for kind in KINDS:
        rows = [("", cells(example)) for example in report.shown_examples(kind)]
        if rows:
            parts += [element("h3", titles[kind]), _table(["example", "truth", "base", "tuned"], rows)]
    return element("section", _title("Where they differ"), *parts) if parts else Markup("")


def _plan(report: Report) -> Markup:
    if not report.plan:
        return Markup("")
    rows = [("", [("", setting), ("", value), ("long", why)]) for setting, value, why in report.plan]
    table = _table(["setting", "value", "why"], rows)
    return element("section", _title("Plan"), element("details", element("summary", "Every setting and why"), table))


def _provenance(report: Report) -> Markup:
    facts: Mapping[str, str] = {
        "model": report.model,
        "data": report.data,
        "task": report.task,
        "method": report.method,
        **report.versions,
    }
    return element(
        "footer",
        _title("Provenance"),
        element("p", " / ".join(f"{k} {v}" for k, v in facts.items()), class_="soft small"),
    )


def _estimate(metric: str, estimate: Estimate | None) -> str:
    return NONE if estimate is None else _change(metric_text(metric, estimate.value), metric, estimate)


def _change(text: str, metric: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return text
    return element("span", text, element("span", interval_text(metric, estimate.low, estimate.high), class_="sub"))


def _table(names: Sequence[str], rows: Sequence[tuple[str, list[tuple[str, str]]]]) -> Markup:
    """rows: (class of the row, cells); a cell is (its class, its content). Its label is shown on a narrow screen."""
    classes = [kind if kind == "num" else "" for kind, _ in rows[0][1]] if rows else [""] * len(names)
    head = element("tr", *(element("th", _words(n), class_=c) for n, c in zip(names, classes, strict=True)))
    body = [
        element(
            "tr",
            *(
                element("td", content, class_=kind, data_label=_words(name))
                for (kind, content), name in zip(cells, names, strict=True)
            ),
            class_=row,
        )
        for row, cells in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def _list(texts: Sequence[str]) -> Markup:
    return element("ul", *(element("li", text) for text in texts))


def _title(text: str) -> Markup:
    return element("h2", text)


def _words(name: str) -> str:
    return name.replace("_", " ")
