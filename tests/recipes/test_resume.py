"""A run that was stopped, killed or finished, and what --resume, --fresh and neither make of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smidgen.core.errors import CheckpointError, RecipeError
from smidgen.training import checkpoint

from ..tiny import reviews, write_csv
from .conftest import digest, names

ROOT = Path(__file__).parents[2]


DROPOUT = {"method": {"name": "lora", "dropout": 0.2}}


def test_a_stopped_run_continues_to_the_bits_and_the_report_of_an_unbroken_one(start, stopped, tmp_path):
    unbroken = start(out=str(tmp_path / "unbroken"), **DROPOUT)
    stopped(**DROPOUT)
    assert names(tmp_path) == ["out.checkpoints", "unbroken"]
    resumed = start(resume=True, **DROPOUT)
    assert "Resuming at step 4 of 6" in resumed.said
    assert names(tmp_path) == ["out", "unbroken"]
    assert digest(resumed.out) == digest(unbroken.out)
    for key in ("curves", "best_step", "confusion", "difference", "examples", "labels", "versions"):
        assert resumed.report[key] == unbroken.report[key], key
    assert resumed.plan | {"memory": ""} == unbroken.plan | {"memory": ""}  # of what was free then
    measured = ("seconds", "peak_bytes")
    for name, row in unbroken.rows.items():
        assert {k: v for k, v in resumed.rows[name].items() if k not in measured} == {
            k: v for k, v in row.items() if k not in measured
        }


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(start, stopped):
    before = checkpoint.newest(stopped())[1].history["seconds"]
    assert start(resume=True).rows["tuned"]["seconds"] > before > 0


def test_resume_starts_where_there_is_nothing_to_resume(start, tmp_path):
    run = start(resume=True)
    assert "Resuming" not in run.said
    assert names(tmp_path) == ["out"]


def test_an_unfinished_run_is_neither_forgotten_nor_continued_unasked(start, stopped, tmp_path):
    checkpoints = stopped()
    with pytest.raises(RecipeError, match=r"out\.checkpoints holds an unfinished run.*--resume.*--fresh"):
        start()
    assert checkpoint.newest(checkpoints)[1].step == 4
    assert "Resuming" not in start(fresh=True).said
    assert names(tmp_path) == ["out"]


def test_a_finished_run_is_neither_replaced_nor_repeated_unasked(start, tmp_path):
    first = start()
    bits = digest(first.out)
    with pytest.raises(RecipeError, match=r"out holds a finished run.*--fresh"):
        start(train={"seed": 1})
    assert "nothing to resume" in start(resume=True).said
    assert digest(first.out) == bits
    start(fresh=True, train={"seed": 1})
    assert digest(first.out) != bits
    assert names(tmp_path) == ["out"]


def test_what_a_run_left_that_was_killed_as_it_tidied_up_is_removed(start, tmp_path):
    """The result was in place, and the checkpoints renamed aside on their way out."""
    start()
    half_gone = tmp_path / ".smidgen-new-0123456789abcdef" / "step-00000006"
    half_gone.mkdir(parents=True)
    assert "nothing to resume" in start(resume=True).said
    assert names(tmp_path) == ["out"]


def test_a_fresh_run_that_was_stopped_leaves_the_old_result_until_the_new_one_is_done(start, stopped, tmp_path):
    old = digest(start().out)
    stopped(fresh=True, train={"seed": 1})
    assert digest(tmp_path / "out") == old
    start(resume=True, train={"seed": 1})
    assert digest(tmp_path / "out") != old
    assert names(tmp_path) == ["out"]


def test_a_folder_of_something_else_is_never_replaced(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    for how in ({}, {"resume": True}, {"fresh": True}):
        with pytest.raises(RecipeError, match="choose another --out"):
            start(**how)
    assert names(tmp_path / "out") == ["thesis.txt"]


def test_the_folder_one_is_in_cannot_be_a_result(start, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RecipeError, match="no folder of its own"):
        start(out=".")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": {"learning_rate": 0.02}}, r"train\.learning_rate was 0\.01, now 0\.02"),
        ({"train": {"steps": 9, "seed": 1}}, r"train\.seed was None, now 1; train\.steps was 6, now 9"),
        ({"method": {"name": "lora", "rank": 2}}, r"method\.rank was None, now 2"),
        ({"method": "bitfit"}, r"method\.name was lora, now bitfit"),
        ({"task": {"max_length": 12}}, r"task\.max_length was None, now 12"),
        ({"report": {"metric": "mcc"}}, r"report\.metric was None, now mcc"),
    ],
)
def test_a_changed_recipe_is_not_resumed_and_the_change_is_named(start, stopped, changed, message):
    checkpoints = stopped()
    with pytest.raises(CheckpointError, match=rf"belongs to another run: {message}\. Say it as before"):
        start(resume=True, **changed)
    assert checkpoint.newest(checkpoints)[1].step == 4


def test_changed_rows_or_another_base_are_not_resumed(start, stopped, tmp_path, llama):
    stopped()
    other = write_csv(tmp_path / "other.csv", reviews(120, seed=1))
    for changed in ({"data": str(other)}, {"model": str(llama)}):
        with pytest.raises(CheckpointError, match="the rows or the base model have changed"):
            start(resume=True, **changed)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_base_of_which_one_weight_has_changed_is_not_resumed(start, stopped, bert, with_other_weight, quantize):
    stopped(model={"path": str(bert), "quantize": quantize})
    with pytest.raises(CheckpointError, match="the rows or the base model have changed"):
        start(resume=True, model={"path": str(with_other_weight), "quantize": quantize})


def test_a_quantised_base_is_found_again(start, stopped, bert):
    stopped(model={"path": str(bert), "quantize": "nf4"})
    assert "Resuming at step 4" in start(resume=True, model={"path": str(bert), "quantize": "nf4"}).said


def test_files_may_move_and_the_report_may_have_more_when_a_run_is_resumed(start, stopped, tmp_path, data):
    stopped()
    moved = tmp_path / "moved.csv"
    moved.write_bytes(data.read_bytes())
    shift = write_csv(tmp_path / "shift.csv", reviews(30, seed=4))
    run = start(resume=True, data={"train": str(moved), "shift": {"more": str(shift)}}, report={"against": ["full"]})
    assert "Resuming at step 4" in run.said
    assert list(run.rows) == ["majority", "base", "tuned", "full"]


def test_a_damaged_checkpoint_is_passed_over_aloud(start, stopped, tmp_path):
    unbroken = start(out=str(tmp_path / "unbroken"))
    checkpoints = stopped(after=5)
    assert names(checkpoints) == ["step-00000004", "step-00000005"]
    (checkpoints / "step-00000005" / checkpoint.OPTIMIZER).write_bytes(b"")
    resumed = start(resume=True)
    assert "passed over" in resumed.said
    assert "step-00000005 is damaged: optimizer.safetensors" in resumed.said
    assert "Resuming at step 4 of 6" in resumed.said
    assert digest(resumed.out) == digest(unbroken.out)


def test_where_all_checkpoints_are_damaged_nothing_is_guessed(start, stopped):
    for path in stopped().iterdir():
        (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        start(resume=True)
    start(fresh=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_in_one_line_and_loses_nothing(bert, data, tmp_path, number):
    out, checkpoints = tmp_path / "out", tmp_path / "out.checkpoints"
    words = [sys.executable, "-m", "smidgen", "tune", "--model", bert, "--data", data, "--out", out]
    words += ["--steps", "2000", "--set", "train.save_every=10", "--set", "train.evaluate_every=2000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 100
        while not (checkpoints / "step-00000010").is_dir():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, number)
        said, errors = process.communicate(timeout=60)
    step = checkpoint.newest(checkpoints)[1].step
    assert process.returncode == 130
    assert errors.decode() == f"stopped at step {step} of 2000; all is saved, continue with --resume\n"
    assert said.decode().count("resume") == 0
    assert names(tmp_path) == ["out.checkpoints"]


def test_three_kills_of_the_command_cost_nothing():
    words = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--kills", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3/3 kills needed no hand")


@pytest.mark.parametrize("method_start", ["eva", "corda_ipm", "lora_ga"])
def test_a_start_that_was_found_on_data_is_found_again_when_a_run_is_resumed(start, stopped, tmp_path, method_start):
    recipe = {"method": {"name": "lora", "start": method_start, "rank": 2}}
    unbroken = start(out=str(tmp_path / "unbroken"), **recipe)
    stopped(**recipe)
    resumed = start(resume=True, **recipe)
    assert "Resuming at step 4 of 6" in resumed.said
    assert digest(resumed.out) == digest(unbroken.out)
