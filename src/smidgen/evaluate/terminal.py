"""The report in a terminal, and just as readable in a pipe or a log: 80 columns, plain ASCII but for the rules.

Ways of answering are columns and figures are rows, so four ways with all their figures fit without wrapping.
"""

from typing import TYPE_CHECKING

from smidgen.evaluate.report import Estimate, Report, cut, other_text, sample_texts
from smidgen.evaluate.units import (
    NONE,
    bytes_text,
    difference_text,
    interval_text,
    metric_text,
    seconds_text,
    share_text,
)
from smidgen.evaluate.verdict import described, findings, outcome_of, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_COLUMNS = 6  # of figures, in the table of parts
COLOURS = {"gained": "green", "lost": "red", "uncertain": "yellow", "not compared": ""}


def show(report: Report, console: "Console") -> None:
    """Print the results, the other data, the verdict with its cost, and the notes."""
    from rich.text import Text

    said = verdict(report)
    console.print()
    console.print(_results(report))
    named = [f"{row.name}: {described(report, row.name)}" for row in report.rows if row.name in ("base", "tuned")]
    console.print(Text(f"{'; '.join(named)}. Brackets are 95 % intervals.", style="dim"))
    if report.part_metrics()[1]:
        console.print(_parts(report))
    if report.shift:
        console.print(_shift(report))
    for sample in report.samples:
        parts = zip(("prompt", "truth", "base", "tuned"), sample_texts(sample), strict=True)
        shown = _table(headed=False)
        shown.add_column(no_wrap=True, style="dim")
        shown.add_column(overflow="fold")
        for name, text in parts:
            shown.add_row(name, Text(cut(text)))
        console.print(shown)
        console.print()
    console.print(Text(said.headline, style=f"bold {COLOURS[said.outcome]}".strip()))
    console.print(Text(f"Cost: {said.cost}."))
    if said.full is not None:
        console.print(Text(said.full))
    notes = _table(headed=False)
    notes.add_column(no_wrap=True)
    notes.add_column(overflow="fold")
    for note in [*findings(report), *report.notes]:
        notes.add_row(Text("-"), Text(note))
    if notes.row_count:
        console.print(notes)


def _results(report: Report) -> "Table":
    from rich.text import Text

    table = _table(headed=True)
    table.add_column("", overflow="fold")
    for row in report.rows:
        table.add_column(Text(row.name), justify="right", no_wrap=True, style="bold" if row.name == "tuned" else "")
    metric, rows = report.metric, report.rows
    table.add_row(Text(metric), *(metric_text(metric, row.value) for row in rows))
    table.add_row(Text("  interval"), *(Text(interval_text(metric, row.low, row.high)) for row in rows))
    for name in report.other_metrics():
        table.add_row(Text(name), *(other_text(row, name) for row in rows))
    table.add_row("trained", *(f"{row.trainable:,}" for row in rows))
    table.add_row("share", *(share_text(row.share) for row in rows))
    table.add_row("peak memory", *(bytes_text(row.peak_bytes) for row in rows))
    table.add_row("time", *(seconds_text(row.seconds) for row in rows))
    table.add_row("on disk", *(bytes_text(row.disk_bytes) for row in rows))
    return table


def _parts(report: Report) -> "Table":
    """A line for each part.  Where all ways do not fit, those that are compared: the page has the others."""
    from rich.text import Text

    metrics, parts = report.part_metrics()
    rows = report.rows
    if len(metrics) * len(rows) > MOST_COLUMNS:
        rows = tuple(row for row in rows if row.name in ("base", "tuned"))
    table = _table(headed=True)
    table.add_column("by part", overflow="fold")
    for metric in metrics:
        for row in rows:
            style = "bold" if row.name == "tuned" else ""
            table.add_column(Text(f"{metric}\n{row.name}"), justify="right", no_wrap=True, style=style)
    for part in parts:
        table.add_row(Text(part), *(other_text(row, f"{metric} {part}") for metric in metrics for row in rows))
    return table


def _shift(report: Report) -> "Table":
    from rich.text import Text

    table = _table(headed=True)
    table.add_column("on other data", overflow="fold")
    for name in ("examples", "base", "tuned", "difference", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def value(estimate: Estimate | None) -> str:
        return NONE if estimate is None else metric_text(report.metric, estimate.value)

    def add(name: str, count: str, base: Estimate | None, own: Estimate, difference: Estimate | None) -> None:
        outcome, change = outcome_of(difference, report.higher_is_better), NONE
        if difference is not None:
            sign = "+" if difference.value > 0 else ""
            interval = interval_text(report.metric, difference.low, difference.high)
            change = f"{sign}{difference_text(report.metric, difference.value)} {interval}"
        table.add_row(Text(name), count, value(base), value(own), Text(change), Text(outcome, style=COLOURS[outcome]))

    for row in report.shift:
        add(row.name, f"{row.count:,}", row.base, row.tuned, row.difference)
        if row.full is not None:
            add("  full", "", row.base, row.full, row.full_difference)
    return table


def _table(*, headed: bool) -> "Table":
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD if headed else None,
        show_header=headed,
        pad_edge=False,
        header_style="bold",
        highlight=False,
    )
