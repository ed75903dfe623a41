"""report.json holds every figure, and the verdict says no more than the intervals do."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from smidgen.core.errors import ConfigError
from smidgen.evaluate.card import model_card
from smidgen.evaluate.page import page
from smidgen.evaluate.report import Estimate, Report
from smidgen.evaluate.terminal import show
from smidgen.evaluate.verdict import BEHIND, findings, verdict
from smidgen.tasks.base import Example, Sample


def test_saving_writes_both_files_and_leaves_nothing_else(binary: Report, tmp_path: Path) -> None:
    binary.save(tmp_path / "run")
    binary.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == binary.to_json()


def test_the_json_has_a_format_and_every_row_with_every_figure(binary: Report) -> None:
    written = json.loads(json.dumps(binary.to_json()))
    assert written["format"] == 1
    assert written["metric"] == "accuracy"
    assert [row["name"] for row in written["rows"]] == ["majority", "base", "tuned", "full"]
    tuned = written["rows"][2]
    assert tuned.keys() == {
        *("name", "value", "low", "high", "trainable", "share", "peak_bytes", "seconds", "disk_bytes", "others")
    }
    assert tuned["others"] == {"macro_f1": 0.840, "mcc": 0.682}
    assert written["difference"] == {"value": 0.062, "low": 0.041, "high": 0.083}
    assert written["curves"]["valid loss"][0][0] == 100
    assert written["plan"][0] == {"setting": "rank", "value": "8", "why": "usual for a model of this size"}
    assert written["shift"][0]["tuned"]["value"] == 0.683


def test_what_is_not_finite_is_null(regression: Report) -> None:
    report = replace(regression, curves={"train loss": [(1, math.nan), (2, math.inf), (3, 0.5)]})
    written = report.to_json()
    assert written["rows"][0]["others"] == {"spearman": None}
    assert written["curves"] == {"train loss": [[1, None], [2, None], [3, 0.5]]}
    json.dumps(written, allow_nan=False)


def test_examples_are_ten_of_each_kind_and_two_hundred_characters(binary: Report) -> None:
    long = Example(text="a\n b" * 400, truth="1", base="0", tuned="1", better="tuned")
    report = replace(binary, examples=[long] * 12 + [replace(long, better="base")] * 3)
    written = report.to_json()["examples"]
    assert [example["better"] for example in written] == ["tuned"] * 10 + ["base"] * 3
    assert len(written[0]["text"]) == 200
    assert written[0]["text"].startswith("a ba ba b")


def test_parts_that_do_not_fit_each_other_are_refused(binary: Report) -> None:
    with pytest.raises(ConfigError, match='the row "tuned"'):
        replace(binary, rows=binary.rows[:2])
    with pytest.raises(ConfigError, match="difference of tuned and base"):
        replace(binary, difference=None)
    with pytest.raises(ConfigError, match="2 labels"):
        replace(binary, confusion=[[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    with pytest.raises(ConfigError, match="one row of each name"):
        replace(binary, rows=binary.rows * 2)


def test_a_gain_says_its_size_its_interval_and_its_cost(binary: Report) -> None:
    said = verdict(binary)
    assert said.outcome == "gained"
    assert said.headline == "Tuned gains 6.2 points of accuracy over the linear probe [4.1, 8.3]."
    assert said.cost == "0.31 % of the parameters trained, 141 KB on disk, 1 min 23 s, peak memory 412 MB"
    assert said.full == "Full fine-tuning reaches 84.8 % [83.2, 86.4]: 45 MB on disk, 6 min 52 s."


@pytest.mark.parametrize(
    ("over_full", "said"),
    [
        (Estimate(-0.019, -0.036, -0.002), "better than tuned by 1.9 points [0.2, 3.6]"),
        (Estimate(-0.007, -0.021, 0.007), "not certainly better than tuned by 0.7 points [-0.7, 2.1]"),
        (Estimate(0.007, -0.007, 0.021), "not certainly worse than tuned by 0.7 points [-0.7, 2.1]"),
        (Estimate(0.030, 0.010, 0.050), "worse than tuned by 3.0 points [1.0, 5.0]"),
        (Estimate(0.0, -0.010, 0.010), "as tuned does [-1.0, 1.0]"),
    ],
)
def test_full_fine_tuning_is_compared_with_tuned_on_the_same_rows(binary: Report, over_full: Estimate, said: str):
    report = replace(binary, over_full=over_full)
    assert verdict(report).full == f"Full fine-tuning reaches 84.8 % [83.2, 86.4], {said}: 45 MB on disk, 6 min 52 s."
    assert not [finding for finding in findings(report) if finding.startswith(BEHIND)]  # nothing shows why
    assert report.to_json()["over_full"] == over_full._asdict()


def test_why_full_fine_tuning_is_better_is_said_where_it_certainly_is(binary: Report) -> None:
    behind = replace(binary, over_full=Estimate(-0.019, -0.036, -0.002), curves=curves_of(0.25), best_step=20)
    full = Estimate(0.650, 0.636, 0.664)  # below all of tuned's interval
    forgets = (replace(binary.shift[0], full=full, full_difference=Estimate(-0.061, -0.075, -0.047)), binary.shift[1])
    cases = [
        (replace(behind, full_curves=curves_of(0.20)), "it fits the training rows less closely (training loss "),
        (replace(behind, full_curves=curves_of(0.25)), "it fits the training rows as closely (training loss 0.250"),
        (
            replace(behind, best_step=40),
            "it was at its best when its steps ended, so more of them may close the gap",
        ),
        (replace(behind, shift=forgets), "on tweets it is ahead (68.3 %, full fine-tuning 65.0 %)"),
    ]
    for report, why in cases:
        (finding,) = [finding for finding in findings(report) if finding.startswith(BEHIND)]
        assert finding.startswith(BEHIND + why)
    uncertain = replace(behind, over_full=Estimate(-0.019, -0.040, 0.002), full_curves=curves_of(0.20))
    (finding,) = [finding for finding in findings(uncertain) if finding.startswith(BEHIND)]
    assert finding.startswith(BEHIND + "not certainly, for the interval includes zero [-0.2, 4.0]; it fits ")
    close = replace(uncertain, over_full=Estimate(-0.009, -0.030, 0.012))
    assert not [finding for finding in findings(close) if finding.startswith(BEHIND)]
    lower = replace(behind, metric="rmse", higher_is_better=False, full_curves=curves_of(0.20))
    assert not [finding for finding in findings(lower) if finding.startswith(BEHIND)]  # lower is better, tuned is lower


def curves_of(loss: float) -> dict[str, list[tuple[int, float]]]:
    steps = (10, 20, 30, 40)
    return {"train loss": [(step, loss) for step in steps], "valid accuracy": [(step, 0.8) for step in steps]}


def test_the_difference_from_full_fine_tuning_goes_with_its_row(binary: Report) -> None:
    with pytest.raises(ConfigError, match="full fine-tuning"):
        replace(binary, rows=binary.rows[:3], over_full=Estimate(0.0, -0.1, 0.1))


def test_a_loss_is_said_as_plainly(binary: Report) -> None:
    said = verdict(replace(binary, difference=Estimate(-0.021, -0.037, -0.004)))
    assert said.outcome == "lost"
    assert said.headline == (
        "Tuned loses 2.1 points of accuracy against the linear probe [0.4, 3.7]: keep the linear probe."
    )


def test_an_interval_around_zero_is_no_certain_gain(many_classes: Report) -> None:
    assert verdict(many_classes).outcome == "uncertain"
    assert verdict(many_classes).headline == (
        "No certain gain: tuned is 0.6 points better in accuracy than the linear probe [-1.1, 2.3]."
    )
    assert any("The gain is not certain" in finding for finding in findings(many_classes))


def test_where_lower_is_better_a_fall_is_a_gain(regression: Report) -> None:
    assert verdict(regression).headline == (
        "Tuned raises rmse by 0.031 against the linear probe [0.012, 0.049]: keep the linear probe."
    )
    fallen = replace(regression, difference=Estimate(-0.031, -0.049, -0.012))
    assert verdict(fallen).outcome == "gained"
    assert verdict(fallen).headline == "Tuned lowers rmse by 0.031 against the linear probe [0.012, 0.049]."


def test_without_a_base_nothing_is_claimed(binary: Report) -> None:
    report = replace(binary, rows=binary.rows[2:3], difference=None)
    assert verdict(report).outcome == "not compared"
    assert verdict(report).headline == "Tuned reaches 84.1 % [82.5, 85.7] accuracy; it was not compared with a base."


def test_an_undefined_difference_is_not_a_gain(binary: Report) -> None:
    assert verdict(replace(binary, difference=Estimate(math.nan, math.nan, math.nan))).outcome == "uncertain"


def test_overfitting_is_found_when_the_validation_loss_rises_and_the_training_loss_falls(binary: Report) -> None:
    [found] = [finding for finding in findings(binary) if finding.startswith("Overfitting")]
    assert "0.448 (step 500) to 0.485 (step 1,000)" in found
    assert found.endswith("The adapter kept is that of step 500.")


def test_a_validation_loss_that_is_lowest_at_the_end_is_no_overfitting(regression: Report) -> None:
    assert not any(finding.startswith("Overfitting") for finding in findings(regression))


def test_a_training_loss_that_rises_too_is_no_overfitting(binary: Report) -> None:
    rising = [(step, 0.2 + step / 1000) for step in range(1, 1001)]
    report = replace(binary, curves={**binary.curves, "train loss": rising})
    assert not any(finding.startswith("Overfitting") for finding in findings(report))


def test_a_loss_on_another_domain_is_named_and_a_gain_is_not(binary: Report) -> None:
    found = "\n".join(findings(binary))
    assert "On tweets tuned is worse than the linear probe by 2.8 points [1.2, 4.4]" in found
    assert "news" not in found


def test_a_tuned_model_no_better_than_the_most_frequent_label_is_named(binary: Report) -> None:
    majority, base, tuned, _ = binary.rows
    report = replace(binary, rows=(majority, base, replace(tuned, value=0.521)))
    assert any("no better than always answering the most frequent label (52.1 %)" in f for f in findings(report))


def test_notes_follow_what_was_found(binary: Report) -> None:
    assert binary.to_json()["notes"] == [*findings(binary), *binary.notes]


def test_what_a_model_says_stands_in_all_forms_of_the_report(binary: Report) -> None:
    from rich.console import Console

    sample = Sample(prompt="who <are> you?", truth="a clerk", base="I am | lost", tuned="a\nclerk")
    report = replace(binary, samples=(sample,))
    drawn, said = page(report), io.StringIO()
    assert "What they say" in drawn
    assert "who &lt;are&gt; you?" in drawn
    show(report, Console(file=said, width=80))
    lines = [line.split(maxsplit=1) for line in said.getvalue().splitlines()]
    assert ["base", "I am | lost"] in [
        [first, *(text.strip() for text in rest)] for first, *rest in filter(None, lines)
    ]
    assert "a clerk" in said.getvalue()
    card = model_card(report, base_model="models/x", library_versions={}, usage="")
    assert "| who \\<are\\> you? | a clerk | I am \\| lost | a clerk |" in card
    assert report.to_json()["samples"] == [
        {"prompt": "who <are> you?", "truth": "a clerk", "base": "I am | lost", "tuned": "a\nclerk"}
    ]
