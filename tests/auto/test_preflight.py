"""Pre-flight finds before the run what would fail in it or learn nothing, and leaves everything as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smidgen
from smidgen import LoRA, Targets
from smidgen.auto.preflight import preflight
from smidgen.core.errors import PreflightError


class Task:
    """As much of a task as the checks ask for."""

    def loss(self, outputs, batch):
        return F.mse_loss(outputs, batch["y"], reduction="sum"), len(batch["y"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.unused = nn.Linear(3, 5)
        self.bypassed = nn.Linear(5, 4)

    def forward(self, batch):
        h = self.body[1](self.body[0](batch["x"]))
        return self.body[2](h) + F.linear(h, self.bypassed.weight)


BATCH = {"x": torch.randn(6, 3), "y": torch.randn(6, 4)}


def adapted(*targets: str, model: nn.Module | None = None):
    model = model or Model()
    adapters = smidgen.attach(model, LoRA(rank=2, targets=Targets(*targets)), seed=0)
    return model, adapters, dict(adapters.named_parameters())


def test_a_good_start_passes_and_nothing_is_changed():
    model, adapters, trained = adapted("body.0", "body.2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = preflight(model, adapters, trained, Task(), [BATCH])
    assert any("all 4 trained tensors get a finite gradient" in line for line in found)
    assert any("leaves the output as it was" in line for line in found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert adapters.active == "default"


@pytest.mark.parametrize("place", ["unused", "bypassed"])
def test_an_adapter_that_nothing_reaches_is_named(place):
    model, adapters, trained = adapted("body.0", place)
    with pytest.raises(PreflightError, match=rf"2 of 4 trained tensors get no gradient.*{place}.A, {place}.B"):
        preflight(model, adapters, trained, Task(), [BATCH])


def test_a_frozen_tensor_with_a_gradient_is_named():
    model, adapters, trained = adapted("body.0")
    model.body[2].bias.requires_grad_(True)
    with pytest.raises(PreflightError, match=r"1 frozen tensors got a gradient: body\.2\.bias"):
        preflight(model, adapters, trained, Task(), [BATCH])


def test_an_adapter_that_changes_the_output_at_its_start_is_refused():
    model, adapters, trained = adapted("body.0")
    with torch.no_grad():
        trained["body.0.B"].fill_(1.0)
    with pytest.raises(PreflightError, match="a fresh adapter should leave the output as it was, and changes it by"):
        preflight(model, adapters, trained, Task(), [BATCH])


def test_a_base_that_is_not_finite_is_refused():
    model = Model()
    with torch.no_grad():
        model.body[0].weight[0, 0] = float("inf")
    model, adapters, trained = adapted("body.2", model=model)
    model.body[1] = nn.ReLU()
    with pytest.raises(PreflightError, match="the base model's output is not finite"):
        preflight(model, adapters, trained, Task(), [{"x": BATCH["x"].abs() + 1, "y": BATCH["y"]}])


def test_a_part_that_the_first_batch_does_not_use_may_wait_for_a_later_one():
    class Sparing(Model):
        def forward(self, batch):
            h = self.body[0](batch["x"])
            return self.body[2](self.body[1](h)) if batch["all"] else h[:, :4]

    first, later = {**BATCH, "all": torch.tensor(False)}, {**BATCH, "all": torch.tensor(True)}
    model, adapters, trained = adapted("body.0", "body.2", model=Sparing())
    assert preflight(model, adapters, trained, Task(), [first, first, later])
    with pytest.raises(PreflightError, match="2 of 4 trained tensors get no gradient"):
        preflight(model, adapters, trained, Task(), [first, first])
