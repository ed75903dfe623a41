"""Attaching changes nothing but what acts; detaching leaves no trace."""

from typing import Any

import pytest
import torch

from smidgen import attach
from smidgen.core.adapter import HELD
from smidgen.core.method import method_named

from .cases import EXAMPLES, Case, gap
from .snapshots import attributes, base_modules, base_tensors, everything, same


def test_a_method_that_says_so_starts_as_the_base_model(stored_case: Case):
    model, adapters = stored_case.attached(fresh=True)
    if not all(part.starts_as_base for part in adapters.parts("a").values()):
        assert all(torch.isfinite(p).all() for p in adapters.parameters("a"))
        return
    assert stored_case.same(stored_case.run(model), stored_case.run(stored_case.model()))


def test_perturbed_adapters_change_the_output(case: Case):
    model, _ = case.attached()
    assert gap(case.run(model), case.run(case.model())) > 1e-3


def test_attaching_changes_no_key_tensor_object_class_or_attribute_of_the_base(case: Case):
    model = case.model()
    tensors, modules = base_tensors(model), base_modules(model)
    bits = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    before = {path: (type(module), attributes(module)) for path, module in modules.items()}
    attach(model, case.method(), "a", seed=1)
    assert [(key, id(tensor)) for key, tensor in base_tensors(model).items()] == [
        (k, id(t)) for k, t in tensors.items()
    ]
    assert same(base_tensors(model), bits)
    assert [(path, id(m)) for path, m in base_modules(model).items()] == [(p, id(m)) for p, m in modules.items()]
    for path, module in base_modules(model).items():
        kind, own = before[path]
        assert isinstance(module, kind)
        assert (type(module).__name__, type(module).__module__) == (kind.__name__, kind.__module__)
        changed = attributes(module)
        own.pop("use_nested_tensor", None), changed.pop("use_nested_tensor", None)
        assert same(changed, own), path


def test_attaching_keeps_the_modes_and_freezes_the_base(typical_case: Case):
    case = typical_case
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


def test_the_same_seed_gives_the_same_start_and_draws_no_global_random_numbers(typical_case: Case):
    model, other = typical_case.model(), typical_case.model()
    state = torch.get_rng_state()
    first = attach(model, typical_case.method(), "a", seed=3).parameters("a")
    second = attach(other, typical_case.method(), "other", seed=3).parameters("other")
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_the_base_loads_strictly_and_leaves_the_adapters_alone(typical_case: Case):
    case = typical_case
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


def test_a_checkpoint_of_the_adapted_model_loads_with_its_adapters(typical_case: Case):
    case = typical_case
    model, _ = case.attached()
    other, _ = case.attached(fresh=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(case.run(other), case.run(model))


@pytest.mark.parametrize("step", ["build", "reset"])
def test_an_attach_that_fails_at_its_last_site_changes_nothing(
    typical_case: Case, step: str, monkeypatch: pytest.MonkeyPatch
):
    case = typical_case
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
