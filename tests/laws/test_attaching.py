"""Attaching changes nothing but what acts; detaching leaves no trace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.core.adapter import HELD
from smidgen.core.method import method_named

from .cases import EXAMPLES, Case, gap

OURS = {HELD, "_smidgen_set", "_smidgen_plan", "_smidgen_values"}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State of the base, in order; the tensors themselves."""
    state = model.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in state.items() if HELD not in key.split(".")}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if HELD not in path.split(".")}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the module has, its tensors and parts by identity."""
    own = {name: value for name, value in module.__dict__.items() if name not in OURS}
    for table in ("_parameters", "_buffers", "_modules"):
        own[table] = [(name, id(value)) for name, value in module.__dict__[table].items() if name != HELD]
    return own


def everything(model: nn.Module) -> dict[str, Any]:
    """All that detaching has to give back, bit for bit."""
    return {
        "modules": [(path, id(module), type(module)) for path, module in model.named_modules()],
        "tensors": [(key, id(t), t.detach().clone()) for key, t in model.state_dict(keep_vars=True).items()],
        "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "attributes": [copy.copy(attributes(module)) for module in model.modules()],
        "names": [list(module.__dict__) for module in model.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)


def test_a_method_that_says_so_starts_as_the_base_model(stored_case: Case):
    model, adapters = stored_case.attached(fresh=True)
    if not all(part.starts_as_base for part in adapters.parts("a").values()):
        assert all(torch.isfinite(p).all() for p in adapters.parameters("a"))
        return
    assert stored_case.same(stored_case.run(model), stored_case.run(stored_case.model()))


def test_perturbed_adapters_change_the_output(stored_case: Case):
    model, _ = stored_case.attached()
    assert gap(stored_case.run(model), stored_case.run(stored_case.model())) > 1e-3


def test_attaching_changes_no_key_tensor_object_class_or_attribute_of_the_base(case: Case):
    model = case.model()
    tensors, modules = base_tensors(model), base_modules(model)
    bits = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    before = {path: (type(module), attributes(module)) for path, module in modules.items()}
    attach(model, case.method(), "a", seed=1)
    assert [(key, id(tensor)) for key, tensor in base_tensors(model).items()] == [(k, id(t)) for k, t in tensors.items()]
    assert same(base_tensors(model), bits)
    assert [(path, id(m)) for path, m in base_modules(model).items()] == [(p, id(m)) for p, m in modules.items()]
    for path, module in base_modules(model).items():
        kind, own = before[path]
        assert isinstance(module, kind)
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
        changed = attributes(module)
        own.pop("use_nested_tensor", None), changed.pop("use_nested_tensor", None)
        assert same(changed, own), path


def test_attaching_keeps_the_modes_and_freezes_the_base(case: Case):
    model = case.model()
    next(iter(model.children())).train()
    modes = {path: module.training for path, module in base_modules(model).items()}
    adapters = attach(model, case.method(), "a", seed=1)
    assert {path: module.training for path, module in base_modules(model).items()} == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if HELD in name.split(".")
    }
    assert all(p.requires_grad for p in adapters.parameters("a"))


def test_detaching_restores_every_bit(case: Case):
    model = case.model()
    next(model.parameters()).requires_grad_(False)  # some of a base may be frozen already
    before, output = everything(model), case.run(model)
    adapters = attach(model, case.method(), "a", seed=1)
    adapters.add(case.method(), "b", seed=2)
    with adapters.rows(["a", None, "b"]):
        case.run(model)
    adapters.activate("b")
    assert adapters.detach() is model
    assert same(everything(model), before)
    assert torch.equal(case.run(model), output)


def test_the_same_seed_gives_the_same_start_and_draws_no_global_random_numbers(case: Case):
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model, after = case.model(), torch.get_rng_state()
    first = attach(model, case.method(), "a", seed=3).parameters("a")
    assert torch.equal(torch.get_rng_state(), after)
    second = attach(case.model(), case.method(), "other", seed=3).parameters("other")
    assert all(map(torch.equal, first, second))
    torch.set_rng_state(state)


def test_a_checkpoint_of_the_base_loads_strictly_and_leaves_the_adapters_alone(case: Case):
    model, adapters = case.attached()
    own = [p.detach().clone() for p in adapters.parameters("a")]
    output = case.run(model)
    checkpoint = case.model().state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if HELD not in name.split(".") and p.is_floating_point():
                p.zero_()
    model.load_state_dict(checkpoint, strict=True)
    assert all(map(torch.equal, adapters.parameters("a"), own))
    assert torch.equal(case.run(model), output)


def test_a_checkpoint_of_the_adapted_model_loads_with_its_adapters(case: Case):
    model, _ = case.attached()
    other, adapters = case.attached(fresh=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(case.run(other), case.run(model))


@pytest.mark.parametrize("step", ["build", "reset"])
def test_an_attach_that_fails_at_its_last_site_changes_nothing(case: Case, step: str, monkeypatch: pytest.MonkeyPatch):
    model = case.model()
    method = case.method().fitted(model)
    sites = method.resolve(model).sites
    kind = type(method) if step == "build" else type(method.build(sites[-1]))
    works, calls = getattr(kind, step), []

    def fails(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == (len(sites) if step == "build" else 1):
            raise RuntimeError("out of luck")
        return works(self, *args)

    monkeypatch.setattr(kind, step, fails)
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        attach(model, method, "a", seed=1)
    assert same(everything(model), before)


@pytest.mark.parametrize("example", EXAMPLES)
def test_settings_are_frozen_and_compare_by_value(example: str):
    name, settings = EXAMPLES[example]
    method = method_named(name)(**settings)
    assert method.settings() == method_named(name)(**method.settings()).settings()
    with pytest.raises(AttributeError):
        method.targets = None
    assert method.summary
    assert method.paper
