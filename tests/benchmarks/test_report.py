"""The page of the benchmarks and its plots."""

import math
from pathlib import Path
from typing import Any

import pytest

TABLE: dict[str, Any] = {
    "title": "a batch",
    "columns": ["", "smidgen / base", "HF PEFT / base", "memory, MB"],
    "rows": [
        ["one", {"median": 1.5, "low": 1.4, "high": 1.7, "rounds": 3}, 2.25, 30.0],
        ["many", 1.25, 3.5, math.nan],
        ["ours alone", 1.125, None, 20.0],
        ["a failure", "ValueError", 4.75, 10.0],
    ],
}


@pytest.fixture
def report() -> Any:
    import report

    return report


def test_a_table_that_names_columns_has_a_picture_on_the_page(report):
    made = "processor instructions cores memory_gb system python threads"
    tables = [TABLE, {**TABLE, "plot": [["memory, MB"]]}]
    result = {"title": "Some", "text": "", "machine": dict.fromkeys(made.split(), ""), "versions": {}, "tables": tables}
    assert report.section("some", result).count("![") == 1
    assert "![a batch](plots/some-1.svg)" in report.section("some", result)


def drawn(report: Any, panels: list[list[str]], file: Path) -> str:
    pytest.importorskip("matplotlib")
    report.draw(TABLE, panels, file)
    return file.read_text()


def test_columns_of_a_panel_stand_side_by_side_in_rows_that_have_all(report, tmp_path):
    svg = drawn(report, [["smidgen / base", "HF PEFT / base"]], tmp_path / "some.svg")
    for text in ("one", "many", "smidgen / base", "HF PEFT / base", "1.50", "2.25", "1.25", "3.50"):
        assert f"<!-- {text} -->" in svg
    for text in ("ours alone", "a failure", "1.12", "4.75"):
        assert f"<!-- {text} -->" not in svg


def test_what_could_not_be_measured_has_no_bar(report, tmp_path):
    svg = drawn(report, [["memory, MB"]], tmp_path / "some.svg")
    assert "<!-- many -->" in svg
    assert "<!-- nan -->" not in svg
    assert report.figure(math.nan) == report.figure(None) == "–"


def test_the_same_figures_give_the_same_picture(report, tmp_path):
    panels = [["smidgen / base"], ["memory, MB"]]
    once = drawn(report, panels, tmp_path / "some.svg")
    assert drawn(report, panels, tmp_path / "some.svg") == once


def test_ratios_that_span_much_start_at_one(report, tmp_path):
    wide = {"columns": ["", "times ours"], "rows": [["saving", 0.875], ["switching", 584]], "title": ""}
    pytest.importorskip("matplotlib")
    report.draw(wide, [["times ours"]], tmp_path / "wide.svg")
    svg = (tmp_path / "wide.svg").read_text()
    assert all(f"<!-- {tick} -->" in svg for tick in ("1", "10", "100", "0.875", "584"))
