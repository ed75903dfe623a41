"""Encoded rows, in parts, flat and kept on disk, are the rows that the task's `encode` gives."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from smidgen.data.columns import Columns
from smidgen.data.flat_rows import FlatRows
from smidgen.data.labels import Labels
from smidgen.data.read import read, reading
from smidgen.data.table import Table
from smidgen.recipes import encode as encode_module
from smidgen.recipes.encode import Encoder, tokenizer_sha256
from smidgen.tasks.base import Examples
from smidgen.tasks.row_roles import RowRoles
from smidgen.tasks.text_classification import TextClassification

from ..tiny import reviews


def table_of(count: int = 60, **more: Any) -> Table:
    texts, labels = zip(*reviews(count), strict=True)
    columns = {"text": list(texts), "label": list(labels), "weight": [i % 3 for i in range(count)], **more}
    return Table(columns, [f"reviews.csv:{i + 2}" for i in range(count)])


def task_of(bert: Path, *, max_length: int = 12, kind: type[TextClassification] = TextClassification, **more: Any):
    columns = Columns(text="text", label="label", **more)
    labels = Labels(kind="binary", names=("negative", "positive"))
    task = kind(AutoTokenizer.from_pretrained(bert), columns, labels, max_length)
    task.beside = RowRoles({"weight": "weight"})
    task.learn_from(table_of())
    return task


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of seven rows."""
    monkeypatch.setattr(encode_module, "FEW", 7)


def same(some: Examples, others: Examples) -> bool:
    assert some.weights is not None
    assert others.weights is not None
    torch.testing.assert_close(some.weights, others.weights)
    return (
        list(some.inputs) == list(others.inputs)
        and torch.equal(some.targets, others.targets)
        and some.lengths == others.lengths
        and some.truncated == others.truncated
    )


@pytest.mark.usefixtures("small_parts")
def test_parts_in_memory_and_on_disk_are_the_rows_that_encode_gives(bert: Path, tmp_path: Path) -> None:
    task, table = task_of(bert), table_of()
    whole = task.encode(table)
    encoder = Encoder(str(tmp_path))
    for examples in (Encoder("off")(task, table), encoder(task, table), encoder(task, table)):
        assert isinstance(examples.inputs, FlatRows)
        assert len(examples.inputs.parts) == 9
        assert same(examples, whole)
        assert task.collate(examples, [3, 50])["input_ids"].equal(task.collate(whole, [3, 50])["input_ids"])
        assert same(examples.select([5, 1]), whole.select([5, 1]))
    assert [state for state, _ in encoder.done] == ["made", "found"]
    where, what = encoder.in_words() or ("", "")
    assert where == str(tmp_path)
    assert what == "60 encoded rows: kept for the next run; 60 encoded rows: found there"


def test_rows_are_kept_where_encoding_takes_long_and_not_otherwise(bert: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    task, table = task_of(bert), table_of()
    quick, slow, off = Encoder(), Encoder(), Encoder("off")
    quick(task, table)
    assert quick.in_words() is None
    monkeypatch.setattr(encode_module, "_WORTH_BYTES", 100)
    slow(task, table)
    off(task, table)
    assert slow.done == [("made", 60)]
    assert off.done == []
    assert {path.name for path in tmp_path.iterdir()} == {"rows"}


def test_what_is_found_is_not_encoded_and_whatever_encoding_looks_at_makes_another_entry(
    bert: Path, tmp_path: Path
) -> None:
    def state(task: TextClassification, table: Table) -> str:
        encoder = Encoder(str(tmp_path))
        encoder(task, table)
        return encoder.done[0][0]

    def fails(table: Table) -> Examples:
        raise AssertionError("it was to be found")

    task, table = task_of(bert), table_of()
    assert state(task, table) == "made"
    task.encode = fails  # type: ignore[method-assign]
    assert state(task, table_of()) == "found"
    moved = replace(table, origins=[f"elsewhere:{i}" for i in range(60)], columns={**table.columns, "more": [0] * 60})
    assert state(task, moved) == "found"
    assert state(task_of(bert, max_length=11), table) == "made"
    assert state(task_of(bert, text_pair="label"), table) == "made"
    texts = list(table.column("text"))
    assert state(task_of(bert), table_of(text=[*texts[:-1], "another"])) == "made"
    assert state(task_of(bert), table_of(text=[*texts[1:], texts[0]])) == "made"
    assert state(task_of(bert), table_of(label=["positive"] * 60)) == "made"
    assert state(task_of(bert), table_of(weight=[1] * 60)) == "made"
    other = task_of(bert)
    other.tokenizer.add_tokens(["superb-film"])
    assert state(other, table) == "made"


def test_a_tokenizer_is_known_by_its_files_and_not_by_what_it_did_last(bert: Path) -> None:
    one, other = (AutoTokenizer.from_pretrained(bert) for _ in range(2))
    other(["a film", "it"], truncation=True, max_length=3, padding=True)
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    other.add_tokens(["superb-film"])
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


def test_damaged_rows_are_encoded_anew_and_it_is_said(bert: Path, tmp_path: Path) -> None:
    task, table = task_of(bert), table_of()
    Encoder(str(tmp_path))(task, table)
    [file] = tmp_path.glob("*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    encoder = Encoder(str(tmp_path))
    assert same(encoder(task, table), task.encode(table))
    assert (encoder.in_words() or ("", ""))[1] == "60 encoded rows: were damaged there, and are made anew"


def test_where_nothing_can_be_written_it_goes_without(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    task, table = task_of(bert), table_of()
    encoder = Encoder(str(tmp_path / "file"))
    assert same(encoder(task, table), task.encode(table))
    assert (encoder.in_words() or ("", ""))[0] == "off"
    assert "file cannot be written: " in (encoder.in_words() or ("", ""))[1]


@pytest.mark.usefixtures("small_parts")
def test_rows_that_stay_in_their_file_are_encoded_to_disk_and_leave_nothing_behind(
    bert: Path, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "reviews.jsonl"
    held = table_of()
    path.write_text("".join(json.dumps({n: c[i] for n, c in held.columns.items()}) + "\n" for i in range(60)))
    with reading(False):
        lazy, _ = read(path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    task = task_of(bert)
    examples = Encoder("off")(task, lazy)
    assert same(examples, task.encode(held))
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del examples
    assert list((tmp_path / "temporary").iterdir()) == []
    encoder = Encoder(str(tmp_path / "cache"))
    encoder(task, held)
    assert same(encoder(task, lazy), task.encode(held))
    assert [state for state, _ in encoder.done] == ["made", "found"]  # by their values, wherever they are


@dataclass
class _Unlike(TextClassification):
    """A task of somebody else, that encodes in a way of its own."""

    def encode(self, table: Table) -> Examples:
        examples = super().encode(table)
        return replace(examples, inputs=[{"input_ids": [1]}] * len(table))

    __init__ = TextClassification.__init__  # type: ignore[assignment]


def test_what_a_class_above_said_of_encoding_is_not_believed_of_another_encode(bert: Path, tmp_path: Path) -> None:
    task, encoder = task_of(bert, kind=_Unlike), Encoder(str(tmp_path))
    assert encoder(task, table_of()).inputs[0] == {"input_ids": [1]}
    assert encoder.done == []


def test_a_run_on_rows_that_stay_in_their_file_comes_to_the_same(start, data: Path, tmp_path: Path) -> None:
    usual = start(out=str(tmp_path / "usual"))
    lazy = start(
        out=str(tmp_path / "lazy"), data={"train": str(data), "in_memory": False, "cache": str(tmp_path / "rows")}
    )
    values = [[row["value"] for row in run.report["rows"]] for run in (usual, lazy)]
    assert values[0] == values[1]
    assert lazy.report["curves"] == usual.report["curves"]
    assert lazy.plan["read when needed"] == "train (120 rows)"
    assert lazy.plan["cache"] == str(tmp_path / "rows")
    assert "read when needed" not in usual.plan
