"""What trains is the adapter, all of it, and nothing else."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smidgen import AdapterSet
from smidgen.core.adapter import HELD
from smidgen.core.recompute import blocks_of, recompute

from .cases import Case, gap


def loss_of(output: Tensor) -> Tensor:
    """Every entry of the output counts, differently."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output.float() * weights).sum()


def gradients(adapters: AdapterSet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in adapters.named_parameters() if p.grad is not None}


def test_after_one_backward_all_adapter_parameters_have_gradients_and_nothing_else_has(stored_case: Case):
    model, adapters = stored_case.attached()
    model.train()
    loss_of(stored_case.run(model)).backward()
    adapters.check_gradients()
    found = gradients(adapters)
    assert found.keys() == {name for name, _ in adapters.named_parameters()}
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), f"the gradient of {name} is all zero"
    assert all(p.grad is None for name, p in model.named_parameters() if HELD not in name.split("."))


def test_a_step_of_training_changes_the_adapter_and_no_parameter_of_the_base(case: Case):
    model, adapters = case.attached(fresh=True)
    base = {name: p.detach().clone() for name, p in case.model().named_parameters()}
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    before = case.run(model).detach()
    for _ in range(2):  # of two factors, one that starts at zero lets the other's gradient through in the second step
        optimiser.zero_grad()
        loss_of(case.run(model)).backward()
        optimiser.step()
    assert gap(case.run(model), before) > 1e-6
    after = {name: p for name, p in model.named_parameters() if HELD not in name.split(".")}
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_activating_and_switching_leave_requires_grad_alone(typical_case: Case):
    model, adapters = typical_case.attached("a", "b")
    for p in adapters.parameters("a"):
        p.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    for expression in ("b", None, "a"):
        adapters.activate(expression)
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(typical_case: Case, reentrant: bool):
    case = typical_case
    model, adapters = case.attached()
    model.train()
    torch.default_generator.manual_seed(2)  # some methods draw in every call
    loss_of(case.run(model)).backward()
    plain = gradients(adapters)
    model.zero_grad()
    torch.default_generator.manual_seed(2)
    output = run_checkpointed(case, model, reentrant)
    loss_of(output).backward()
    checkpointed = gradients(adapters)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():  # of what several layers share, the reentrant kind sums in another order
        assert torch.equal(checkpointed[name], gradient) or gap(checkpointed[name], gradient) <= case.tolerance


def test_blocks_that_recompute_give_the_same_gradients(typical_case: Case):
    case = typical_case
    model, adapters = case.attached()
    if not blocks_of(model):
        pytest.skip("this body has no list of blocks")
    model.train()
    found = []
    for level in ("off", "cheap"):
        model.zero_grad()
        torch.default_generator.manual_seed(2)
        with recompute(model, level):
            loss_of(case.run(model)).backward()
        found.append(gradients(adapters))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient) or gap(found[1][name], gradient) <= case.tolerance, name


def run_checkpointed(case: Case, model: nn.Module, reentrant: bool) -> Tensor:
    """By transformers' own way where the model has it, else the whole model in one segment."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return case.run(model)
    anchor = torch.zeros((), requires_grad=True)  # the reentrant kind wants an input that requires a gradient
    run: Any = functools.partial(_with_anchor, case, model)
    return checkpoint(run, anchor, use_reentrant=reentrant)


def _with_anchor(case: Case, model: nn.Module, anchor: Tensor) -> Tensor:
    return case.run(model)
