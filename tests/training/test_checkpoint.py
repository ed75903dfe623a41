"""A checkpoint is whole or not there, and a resume from it is bit-equal."""

import dataclasses
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from smidgen.core.errors import CheckpointError
from smidgen.training import checkpoint
from smidgen.training.checkpoint import State

FILES = ("adapter-state.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
forking = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def state(step: int, **changes) -> State:
    """A state in which every number says its step, so that a mix of two is seen."""
    value = State(
        step=step,
        tensors={"q_proj.A": torch.full((3, 5), float(step))},
        optimizer={"state": {0: {"exp_avg": torch.full((3, 5), float(step))}}, "param_groups": [{"lr": 1e-3}]},
        history={"loss": [float(step)]},
        fingerprint="a",
    )
    return dataclasses.replace(value, **changes)


def is_of(found: State, step: int) -> bool:
    numbers = {found.step, found.history["loss"][0]}
    tensors = (found.tensors["q_proj.A"], found.optimizer["state"][0]["exp_avg"])
    return numbers == {step} and all(torch.equal(tensor, torch.full((3, 5), float(step))) for tensor in tensors)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, betas=(0.8, 0.99)),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, name):
    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer

    def steps(first, last, model, optimizer):
        losses = []
        for step in range(first, last):
            torch.manual_seed(step)  # as the loop does: all randomness of a step follows from its number
            loss = model(torch.randn(4, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = start()
    steps(0, 3, model, optimizer)
    checkpoint.save(tmp_path, state(3, tensors=model.state_dict(), optimizer=optimizer.state_dict()))
    unbroken = steps(3, 7, model, optimizer)

    resumed_model, resumed_optimizer = start()
    _, found, damaged = checkpoint.newest(tmp_path, fingerprint="a")
    assert damaged == []
    resumed_model.load_state_dict(found.tensors)
    resumed_optimizer.load_state_dict(found.optimizer)
    assert steps(3, 7, resumed_model, resumed_optimizer) == unbroken
    for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_plain_data_comes_back_as_it_was(tmp_path):
    history = {
        "best": float("-inf"),
        "betas": (0.9, 0.999),
        "nested": {1: [None, True, "text", 0.1], "$odd": {"a": ()}},
        "best_step": None,
    }
    found = checkpoint.load(checkpoint.save(tmp_path, state(1, history=history)))
    assert found.history == history
    assert isinstance(found.history["betas"], tuple)
    assert found.fingerprint == "a"


def test_what_is_not_plain_data_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"history\.lr_lambdas\.0 is a builtins\.function"):
        checkpoint.save(tmp_path, state(1, history={"lr_lambdas": [lambda step: 1.0]}))
    assert names(tmp_path) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [truncate, os.remove, flip_bit])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    damage(tmp_path / "step-00000002" / file)
    path, found, damaged = checkpoint.newest(tmp_path)
    assert path.name == "step-00000001"
    assert is_of(found, 1)
    assert len(damaged) == 1
    assert "step-00000002 is damaged" in damaged[0]
    assert [name for name in FILES if f"{name}: " in damaged[0]] == [file]


def test_no_flipped_bit_of_the_manifest_goes_unseen(tmp_path):
    manifest = checkpoint.save(tmp_path, state(1)) / "manifest.json"
    good = manifest.read_bytes()
    for place in range(len(good)):
        manifest.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=r"is damaged: manifest\.json: "):
            checkpoint.load(manifest.parent)


def test_if_all_are_damaged_the_run_does_not_start_afresh_by_itself(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2):
        truncate(checkpoint.save(tmp_path, state(step)) / "state.json")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*step-00000002 .*state.json.*step-00000001 "):
        checkpoint.newest(tmp_path)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    truncate(checkpoint.save(tmp_path, state(2)) / "state.json")
    checkpoint.save(tmp_path, state(2))
    assert is_of(checkpoint.newest(tmp_path)[1], 2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint.save(tmp_path, state(1))
    with pytest.raises(CheckpointError, match=r"belongs to another run.*fingerprint a, now b.*start afresh"):
        checkpoint.newest(tmp_path, fingerprint="b")


def test_the_last_ones_are_kept(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]
    with pytest.raises(CheckpointError, match="keep is 0"):
        checkpoint.save(tmp_path, state(7), keep=0)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CheckpointError, match=r"step 2: the checkpoint was not written: .*MB are free there"):
        checkpoint.save(tmp_path, state(2))
    assert names(tmp_path) == ["step-00000001"]


def saving_child(folder: Path, first: int = 1, last: int = 10**6) -> int:
    """A process that saves every step; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            for step in range(first, last + 1):
                checkpoint.save(folder, state(step))
            os._exit(0)
        finally:
            os._exit(1)
    return child


@forking
def test_fifteen_kills_leave_nothing_to_be_mended(tmp_path):
    moments, step = random.Random(0), 0
    for _ in range(15):
        child = saving_child(tmp_path, first=step + 1)
        time.sleep(moments.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (result := checkpoint.newest(tmp_path)) is None:
            continue
        _, found, damaged = result
        assert damaged == []
        assert found.step >= step
        assert is_of(found, found.step)
        assert all(len(names(folder)) == 4 for folder in tmp_path.glob("step-*"))
        step = found.step
    assert step > 0
    checkpoint.save(tmp_path, state(step + 1))
    assert names(tmp_path) == [f"step-{step:08d}", f"step-{step + 1:08d}"]  # nothing left over by the killed


@forking
def test_two_processes_may_save_at_once(tmp_path):
    children = [saving_child(tmp_path, last=40) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    _, found, damaged = checkpoint.newest(tmp_path)
    assert damaged == []
    assert is_of(found, 40)
    assert names(tmp_path) == ["step-00000039", "step-00000040"]
