"""The terminal shows whole figures at 80 columns, in colour or piped, and takes brackets as text."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from smidgen.evaluate.card import model_card
from smidgen.evaluate.page import page
from smidgen.evaluate.report import Estimate, Report
from smidgen.evaluate.terminal import show


def shown(report: Report, *, terminal: bool = False, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    show(report, Console(file=file, width=80, force_terminal=terminal, color_system="standard" if terminal else None))
    file.flush()
    return written.getvalue().decode(encoding)


@pytest.mark.parametrize("kind", ["binary", "many_classes", "regression", "entities"])
def test_piped_output_is_plain_and_fits_eighty_columns(kind: str, request: pytest.FixtureRequest) -> None:
    text = shown(request.getfixturevalue(kind))
    assert "\x1b" not in text
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_each_figure_stands_whole_on_the_line_of_its_name(binary: Report) -> None:
    lines = {" ".join(line.split()) for line in shown(binary).splitlines()}
    assert "accuracy 52.1 % 77.9 % 84.1 % 84.8 %" in lines
    assert "interval [49.9, 54.3] [76.1, 79.7] [82.5, 85.7] [83.2, 86.4]" in lines
    assert "mcc 0.000 0.558 0.682 0.696" in lines
    assert "trained 0 258 34,562 11,171,074" in lines
    assert "time 0.02 s 11 s 1 min 23 s 6 min 52 s" in lines
    assert "tweets 4,200 71.1 % 68.3 % -2.8 points [-4.4, -1.2] lost" in lines
    assert "Tuned gains 6.2 points of accuracy over the linear probe [4.1, 8.3]." in lines


def test_figures_of_many_parts_have_a_line_for_each_in_all_forms_of_the_report(entities: Report) -> None:
    lines = [" ".join(line.split()) for line in shown(entities).splitlines()]
    assert "TYPE17 67.0 % 77.0 % 67.0 % 77.0 % 67.0 % 77.0 %" in lines  # base and tuned: full is not room for
    assert "macro_f1 50.0 % 60.0 % 65.0 %" in lines
    assert not any(line.startswith("f1 TYPE") for line in lines)
    for text in (page(entities), model_card(entities, base_model="models/base", library_versions={}, usage="")):
        assert text.count("TYPE17") == 1
        assert text.count("82.0 %") == 3
    assert entities.to_json()["rows"][1]["others"]["recall TYPE17"] == pytest.approx(0.77)


def test_few_figures_of_parts_show_full_fine_tuning_too(entities: Report) -> None:
    rows = tuple(replace(row, others={"map50 old": row.value, "map50 new": 0.5}) for row in entities.rows)
    lines = {" ".join(line.split()) for line in shown(replace(entities, rows=rows)).splitlines()}
    assert "old 61.2 % 74.3 % 75.1 %" in lines
    assert "new 50.0 % 50.0 % 50.0 %" in lines


def test_a_loss_and_its_notes_are_shown(regression: Report) -> None:
    text = " ".join(shown(regression).split())
    assert "Tuned raises rmse by 0.031 against the linear probe [0.012, 0.049]: keep the linear probe." in text
    assert "3 of 8,000 training rows were skipped" in text


def test_a_terminal_gets_colour(binary: Report) -> None:
    assert "\x1b[1;32mTuned gains" in shown(binary, terminal=True)


def test_a_terminal_without_unicode_is_served(binary: Report) -> None:
    assert "Tuned gains 6.2 points" in shown(binary, encoding="ascii")


def test_brackets_in_names_are_text_and_not_colours(binary: Report) -> None:
    rows = tuple(replace(row, others={"[red]f1": 0.5}) for row in binary.rows)
    shift = (replace(binary.shift[0], name="[bold]tweets"),)
    text = shown(replace(binary, rows=rows, shift=shift, notes=["[link=x]y"], base_name="[dim]probe"))
    assert all(name in text for name in ("[red]f1", "[bold]tweets", "[link=x]y", "[dim]probe"))


def test_long_metric_names_leave_the_figures_whole(binary: Report) -> None:
    rows = tuple(replace(row, others={"balanced_accuracy": 0.5}) for row in binary.rows)
    text = shown(replace(binary, rows=rows))
    assert "[83.2, 86.4]" in text
    assert "balanced_accuracy" in text


def test_other_data_shows_full_fine_tuning_where_it_was_compared_with(binary: Report) -> None:
    full = Estimate(0.652, 0.638, 0.666)
    shift = (replace(binary.shift[0], full=full, full_difference=Estimate(-0.059, -0.075, -0.043)), binary.shift[1])
    report = replace(binary, shift=shift)
    text = shown(report)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "tweets 4,200 71.1 % 68.3 % -2.8 points [-4.4, -1.2] lost" in lines
    assert "full 71.1 % 65.2 % -5.9 points [-7.5, -4.3] lost" in lines
    assert max(map(len, text.splitlines())) <= 80
    said = "On tweets full fine-tuning is worse than the linear probe by 5.9 points [4.3, 7.5]"
    assert said in " ".join(text.split())
    assert "65.2 %" in page(report)
    written = model_card(report, base_model="models/base", library_versions={}, usage="")
    assert "| data | examples | base | full | tuned |" in written
    assert report.to_json()["shift"][0]["full"]["value"] == 0.652
    assert report.to_json()["shift"][1]["full"] is None
