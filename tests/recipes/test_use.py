"""A result is used: predictions, evaluation, merging; and what is said where it cannot be."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from smidgen.core.errors import DataError, FolderError, ModelError, RecipeError
from smidgen.core.safe import read_tensors
from smidgen.recipes.save import load_result
from smidgen.recipes.use import evaluate, merge, predict
from smidgen.tasks.text.classifiers import TextClassifier

from ..tiny import reviews, write_csv


@pytest.fixture(scope="module")
def texts():
    return [text for text, _ in reviews(30, seed=5)]


@pytest.fixture
def out(start):
    """A result that differs from its start."""
    return start(train={"steps": 12, "evaluate_every": 1, "patience": 100, "seed": 1}).out


def predicted(folder, **said):
    """What `predict` prints, line by line."""
    console = io.StringIO()
    given = {"data": None, "model": None, "text": [], "out": None} | said
    predict(folder, given.pop("data"), console=Console(file=console, width=40), **given)
    return [json.loads(line) for line in console.getvalue().splitlines()]


def test_predictions_are_lines_of_json_in_the_order_of_the_texts(out, texts):
    found = predicted(out, text=texts)
    assert [line["text"] for line in found] == texts
    assert {line["prediction"] for line in found} == {"negative", "positive"}
    assert all(0.5 <= line["probability"] <= 1 for line in found)
    # alone or among others, a text has the same prediction
    assert predicted(out, text=texts[3:4]) == found[3:4]


def test_predictions_of_a_file_are_those_of_its_texts(out, texts, tmp_path):
    labelled = write_csv(tmp_path / "labelled.csv", reviews(30, seed=5))
    renamed = write_csv(tmp_path / "renamed.csv", [[text] for text in texts], ["comment"])
    expected = predicted(out, text=texts)
    assert predicted(out, data=str(labelled)) == expected
    assert predicted(out, data=str(renamed)) == expected
    predict(out, str(labelled), model=None, text=[], out=tmp_path / "answers.jsonl", console=Console(quiet=True))
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == expected


def test_the_right_ones_among_the_predictions_are_the_accuracy(out, evaluated, tmp_path):
    rows = reviews(30, seed=5)
    data = write_csv(tmp_path / "rows.csv", rows)
    right = sum(
        line["prediction"] == label for line, (_, label) in zip(predicted(out, data=str(data)), rows, strict=True)
    )
    found = evaluated(out, data)
    assert found["accuracy"] == pytest.approx(right / 30)
    assert found["low"] <= found["accuracy"] <= found["high"]


def test_a_merged_model_gives_the_same_outputs_without_smidgen(out, texts, tmp_path):
    from transformers import AutoModel

    console = io.StringIO()
    merge(out, tmp_path / "merged", model=None, max_error=0.05, dtype=None, console=Console(file=console))
    assert "merged 12 sites" in console.getvalue()
    tuned = load_result(out)
    task = tuned.task
    examples = task.encode(table(task, texts))
    batch = task.collate(examples, range(len(texts)))
    body = AutoModel.from_pretrained(tmp_path / "merged")
    merged = TextClassifier(body, task.outputs).eval()
    merged.head.load_state_dict(read_tensors(tmp_path / "merged" / "head.safetensors"))
    base = TextClassifier(AutoModel.from_pretrained(tuned.located.source), task.outputs).eval()
    base.head.load_state_dict(read_tensors(out / "head.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(merged(batch), tuned.model(batch), rtol=0, atol=1e-5)
        assert (base(batch) - merged(batch)).abs().max() > 1e-2  # else there was nothing to merge
    with pytest.raises(RecipeError, match="is there already"):
        merge(out, tmp_path / "merged", model=None, max_error=0.05, dtype=None, console=Console(quiet=True))
    again = load_result(tmp_path / "merged")
    assert again.adapters is None
    with torch.no_grad():
        assert torch.equal(again.model(batch), merged(batch))
    with pytest.raises(RecipeError, match="is merged already"):
        merge(
            tmp_path / "merged", tmp_path / "twice", model=None, max_error=0.05, dtype=None, console=Console(quiet=True)
        )


def table(task, texts):
    from smidgen.data.table import Table

    return Table({task.columns.text: texts}, [str(i) for i in range(len(texts))])


def test_a_base_that_moved_is_asked_for_and_found(start, bert, data, tmp_path, texts):
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(bert, there)
    out = start(model=str(there)).out
    expected = predicted(out, text=texts)
    there.rename(here)
    with pytest.raises(ModelError, match=r"was trained on .*there: there is no folder .*--model FOLDER"):
        predicted(out, text=texts)
    assert predicted(out, text=texts, model=str(here)) == expected


def test_another_base_is_refused(out, llama, tmp_path):
    with pytest.raises(FolderError, match="does not fit this model"):
        predicted(out, text=["a film"], model=str(llama))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda note: note["extra"].pop("task"), 'has no "task"'),
        (lambda note: note["extra"]["task"].pop("labels"), "describes its task"),
        (lambda note: note["extra"]["task"].update(kind="tea"), "describes its task|needed"),
        (lambda note: note["extra"]["task"].update(columns={"no": "such"}), "describes its task"),
        (lambda note: note["extra"]["task"].update(labels=["one", "two", "three"]), "belongs to another adapter"),
        (lambda note: note["extra"].update(base_model=["a"]), "names its base model"),
    ],
)
def test_a_note_that_was_tampered_with_is_refused(out, change, message):
    note = json.loads((out / "smidgen.json").read_text())
    change(note)
    (out / "smidgen.json").write_text(json.dumps(note))
    with pytest.raises(FolderError, match=message):
        load_result(out)


def test_what_cannot_be_used_is_said(out, tmp_path):
    with pytest.raises(FolderError, match=r"nothing is not there"):
        predicted(tmp_path / "nothing", text=["a"])
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(FolderError, match=r"rows\.csv is a file; a result of `smidgen tune` is a folder"):
        predicted(tmp_path / "rows.csv", text=["a"])
    with pytest.raises(RecipeError, match="nothing to predict"):
        predicted(out)
    unlabelled = write_csv(tmp_path / "unlabelled.csv", [["a lovely film"], ["a bad plot"]], ["text"])
    with pytest.raises(DataError, match="--label-column"):
        evaluate(out, str(unlabelled), model=None, console=Console(quiet=True), as_json=False)
    foreign = write_csv(tmp_path / "foreign.csv", [("a film", "positive"), ("a plot", "neutral")])
    with pytest.raises(DataError, match=r"1 of 2 rows.*\n.*foreign\.csv:3.*\"neutral\" is not a class"):
        evaluate(out, str(foreign), model=None, console=Console(quiet=True), as_json=False)
