"""One checkpoint has one fingerprint, in fp32 and bf16, with and without adapters; another checkpoint has another."""

import copy
import time

import pytest
import torch
from torch import nn

from smidgen import LoRA, attach
from smidgen.core.fingerprint import fingerprint, same_base


def net(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, width), nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, 3)
    )


def test_a_bf16_copy_is_the_same_base() -> None:
    assert fingerprint(net()) == fingerprint(net().bfloat16())


def test_adapters_do_not_count() -> None:
    model = net()
    before = fingerprint(model)
    adapters = attach(model, LoRA(rank=2), seed=0)
    assert fingerprint(model) == before
    adapters.detach()
    assert fingerprint(model) == before


@pytest.mark.parametrize("layer", ["0", "1", "2", "3"])
def test_other_weights_in_any_layer_are_another_base(layer: str) -> None:
    model, other = net(), net()
    with torch.no_grad():
        other.get_submodule(layer).weight.mul_(1.1)
    assert not same_base(fingerprint(model), fingerprint(other))
    assert fingerprint(model, leave_out=[layer]) == fingerprint(other, leave_out=[layer])


def test_a_change_in_place_is_seen_and_an_unchanged_model_is_not_read_again() -> None:
    model = net()
    before = fingerprint(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    assert fingerprint(model) != before
    with torch.no_grad():
        model[1].weight.add_(-1)
    again = copy.deepcopy(model)
    assert fingerprint(model) == fingerprint(again)


def test_other_shapes_and_names_are_another_base() -> None:
    assert not same_base(fingerprint(net()), fingerprint(net(32)))
    assert not same_base(
        fingerprint(nn.Sequential(nn.Linear(3, 5))), fingerprint(nn.ModuleDict({"a": nn.Linear(3, 5)}))
    )


def test_weights_that_cannot_be_read_count_by_shape() -> None:
    class Packed(nn.Linear):
        """A linear layer held in another dtype and shape, as quantised ones are."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features)
            self.bias = linear.bias
            self.weight = nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)

    model, quantised = net(), net()
    quantised[1] = Packed(quantised[1])
    assert same_base(fingerprint(model), fingerprint(quantised))
    with torch.no_grad():
        quantised[2].weight.mul_(2)
    assert not same_base(fingerprint(model), fingerprint(quantised))
    assert fingerprint(net().to("meta")).endswith("-?-?")


def test_a_compiled_model_is_the_same_base() -> None:
    assert fingerprint(torch.compile(net(), backend="eager")) == fingerprint(net())


def test_what_is_no_fingerprint_is_not_the_same() -> None:
    assert not same_base("", fingerprint(net()))
    assert not same_base("?", "?")


def test_300_tensors_cost_milliseconds() -> None:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(150)])
    start = time.process_time()
    fingerprint(model)
    assert time.process_time() - start < 0.1  # about 0.004
