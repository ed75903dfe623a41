"""Optimisers: groups, and states in 8 bit that a checkpoint holds to the bit."""

import importlib.util

import pytest
import torch
from torch import nn

from smidgen.core.errors import MissingDependency
from smidgen.training import checkpoint
from smidgen.training.optim import STATE_BYTES, Group, optimizer_of

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not has_bitsandbytes, reason='needs bitsandbytes: pip install "smidgen[8bit]"')


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"A": nn.Parameter(torch.randn(64, 128)), "b": nn.Parameter(torch.randn(10))}


def group(own: dict[str, nn.Parameter]) -> Group:
    return Group(parameters=own, learning_rate=1e-3, weight_decay=0.1)


def step(own: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in own.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_matrices_decay_and_vectors_do_not():
    own = parameters()
    found = [(g["params"], g["lr"], g["weight_decay"]) for g in optimizer_of([group(own)]).param_groups]
    assert found == [([own["A"]], 1e-3, 0.1), ([own["b"]], 1e-3, 0.0)]


@pytest.mark.skipif(has_bitsandbytes, reason="bitsandbytes is installed")
def test_a_missing_package_is_named_with_what_it_would_save():
    with pytest.raises(MissingDependency, match=r'bitsandbytes: pip install "smidgen\[8bit\]"\. It saves 6 bytes per'):
        optimizer_of([group(parameters())], "adamw8bit")


@needs_bitsandbytes
def test_states_in_8_bit_take_two_bytes_and_a_little():
    own = parameters()
    optimizer = optimizer_of([group(own)], "adamw8bit")
    step(own, optimizer, 0)
    state = optimizer.state[own["A"]]
    per_entry = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2")) / own["A"].numel()
    assert STATE_BYTES["adamw8bit"] <= per_entry <= 1.02 * STATE_BYTES["adamw8bit"]


@needs_bitsandbytes
def test_a_checkpoint_holds_states_in_8_bit_to_the_bit(tmp_path):
    own = parameters()
    optimizer = optimizer_of([group(own)], "adamw8bit")
    for seed in range(3):
        step(own, optimizer, seed)
    tensors = {name: p.detach() for name, p in own.items()}
    state = checkpoint.State(step=3, tensors=tensors, optimizer=optimizer.state_dict(), history={}, fingerprint="f")
    path = checkpoint.save(tmp_path, state)
    for seed in range(3, 6):
        step(own, optimizer, seed)
    other, saved = parameters(), checkpoint.load(path)
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(saved.tensors[name])
    again = optimizer_of([group(other)], "adamw8bit")
    again.load_state_dict(saved.optimizer)
    for seed in range(3, 6):
        step(other, again, seed)
    assert all(map(torch.equal, other.values(), own.values()))
