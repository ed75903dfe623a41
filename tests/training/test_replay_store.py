"""Rows that are kept: bounded, in memory or in a file that is whole, of this run, or recorded again."""

import json

import pytest
import torch

from smidgen.core.files import sha256_file
from smidgen.training import replay_store
from smidgen.training.replay_store import Store, room_in_memory, room_on_disk

OUTPUTS = [torch.arange(24.0).view(4, 3, 2), torch.arange(8, dtype=torch.bfloat16).view(4, 2)]  # two units, two rows of
ROWS = [5, 2]  # two sides each


def store(folder=None, *, limit_bytes=1 << 20, fingerprint="mine", **settings):
    return Store({"train": 2}, limit_bytes=limit_bytes, folder=folder, fingerprint=fingerprint, **settings)


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return tmp_path / "replay" if request.param == "disk" else None


def test_rows_come_back_as_they_were(folder):
    kept = store(folder)
    assert not kept.has("train", [5])
    kept.put("train", ROWS, OUTPUTS)
    assert kept.has("train", [2, 5])
    assert kept.is_whole("train")
    first, second = kept.get("train", 0, [2, 5])
    assert torch.equal(first, OUTPUTS[0][[1, 3]])  # (sides, ...): the rows of a side stand together
    assert torch.equal(second, OUTPUTS[0][[0, 2]])
    assert torch.equal(kept.get("train", 1, [5])[0], OUTPUTS[1][[0, 2]])
    assert kept.get("train", 1, [5])[0].dtype == torch.bfloat16


def test_what_is_kept_is_a_copy_or_the_caller_s_own(folder):
    kept, outputs = store(folder), [tensor.clone() for tensor in OUTPUTS]
    kept.put("train", ROWS, outputs)
    for tensor in kept.get("train", 0, [5]):
        assert torch.equal(tensor, OUTPUTS[0][[0, 2]])


def test_rounding_takes_half_the_room(folder):
    whole, half = store(folder), store(folder and folder.with_name("half"), dtype=torch.bfloat16)
    for kept in (whole, half):
        kept.put("train", ROWS, OUTPUTS[:1])
    assert (whole.size_bytes, half.size_bytes) == (24 * 4, 24 * 2)
    assert half.get("train", 0, [2])[0].dtype == torch.bfloat16


def test_a_set_that_goes_beyond_the_limit_is_given_up_and_leaves_nothing(folder):
    kept = store(folder, limit_bytes=24 * 4 + 8 * 2 - 1)
    kept.put("train", ROWS, OUTPUTS)
    assert not kept.takes("train")
    assert not kept.has("train", [5])
    assert not kept.is_whole("train")
    assert folder is None or list(folder.iterdir()) == []


def test_a_full_disk_is_the_end_of_the_set_and_not_of_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left on device")

    kept = store(tmp_path)
    monkeypatch.setattr(replay_store._InFile, "append", full)
    kept.put("train", ROWS, OUTPUTS)
    assert not kept.takes("train")


def test_a_file_grows_batch_by_batch(tmp_path):
    kept = Store({"train": 4}, limit_bytes=1 << 20, folder=tmp_path)
    kept.put("train", [0, 1], OUTPUTS)
    before = kept.get("train", 0, [1])[0].clone()
    assert not (tmp_path / "train.json").exists()
    kept.put("train", [2, 3], [tensor + 1 for tensor in OUTPUTS])
    assert torch.equal(kept.get("train", 0, [1])[0], before)
    assert torch.equal(kept.get("train", 0, [3])[0], before + 1)
    note = json.loads((tmp_path / "train.json").read_text())
    assert note["sha256"] == sha256_file(tmp_path / "train.rows")
    assert all(begin % 64 == 0 for batch in note["batches"] for begin, _, _ in batch)


def test_a_whole_file_of_the_same_run_is_taken_over(tmp_path):
    store(tmp_path).put("train", ROWS, OUTPUTS)
    again = store(tmp_path)
    assert (again.is_whole("train"), again.notes) == (True, [])
    assert torch.equal(again.get("train", 0, [2])[0], OUTPUTS[0][[1, 3]])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("bit", "is not as it was written; recorded again"),
        ("short", "is not as it was written; recorded again"),
        ("note", "recorded again"),
        ("fingerprint", "is of other rows, another model or another version; recorded again"),
        ("gone", "recorded again"),
    ],
)
def test_a_damaged_or_foreign_file_is_told_and_goes(tmp_path, damage, said):
    store(tmp_path).put("train", ROWS, OUTPUTS)
    path, note = tmp_path / "train.rows", tmp_path / "train.json"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[3] ^= 1
        path.write_bytes(data)
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "note":
        note.write_text(note.read_text()[:-5])
    elif damage == "gone":
        path.unlink()
    again = store(tmp_path, fingerprint="another" if damage == "fingerprint" else "mine")
    assert not again.has("train", [5])
    assert len(again.notes) == 1
    assert again.notes[0].endswith(said)
    assert list(tmp_path.iterdir()) == []
    again.put("train", ROWS, OUTPUTS)
    assert store(tmp_path, fingerprint=again.fingerprint).is_whole("train")


def test_a_file_that_was_not_finished_goes_without_a_word(tmp_path):
    Store({"train": 4}, limit_bytes=1 << 20, folder=tmp_path).put("train", [0, 1], OUTPUTS)
    again = Store({"train": 4}, limit_bytes=1 << 20, folder=tmp_path)
    assert (again.has("train", [0]), again.notes) == (False, [])


def test_the_room_is_a_share_of_what_is_free(tmp_path):
    device = torch.device("cpu")
    assert 0 < room_in_memory(device, 2) <= room_in_memory(device) + (1 << 28)
    assert room_on_disk(tmp_path / "not" / "there") > 0
