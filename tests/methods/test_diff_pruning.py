"""Diff pruning against its equations, and what pruning leaves."""

import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError
from smidgen.methods.diff_pruning import DiffPruning


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def trained(steps: int = 10, **settings):
    model = net()
    adapters = attach(model, DiffPruning(targets=Targets.of_type(nn.Linear), **settings))
    optimiser = torch.optim.AdamW(adapters.parameters(), lr=0.05)
    adapters.follow(optimiser, steps)
    model.train()
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    return model.eval(), adapters, x


@pytest.mark.parametrize("structured", [False, True])
def test_gates_are_stretched_and_clamped_sigmoids(structured: bool):
    model = nn.Sequential(nn.Linear(3, 2).double())
    part = attach(model, DiffPruning(targets="0", structured=structured)).parts("default")["0"]
    nn.init.normal_(part.difference)
    nn.init.normal_(part.gate)
    z = (part.gate.sigmoid() * (1.5 + 1.5) - 1.5).clamp(0, 1)  # hard concrete, stretched to (-1.5, 1.5)
    group = (part.group_gate.sigmoid() * 3 - 1.5).clamp(0, 1) if structured else 1
    torch.testing.assert_close(part.weight_delta(slice(None)), group * z * part.difference, rtol=0, atol=1e-14)
    probability = part.gate.sigmoid() * (part.group_gate.sigmoid() if structured else 1)
    torch.testing.assert_close(part.expected_entries(), probability.sum())


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_formula_for_the_gates_that_were_drawn(dtype, structured):
    layer = nn.Linear(6, 9).to(dtype)
    adapters = attach(nn.Sequential(layer), DiffPruning(targets="0", structured=structured))
    adapters.follow(torch.optim.SGD(adapters.parameters(), 0.0), 1)
    part, x = adapters.parts("default")["0"], torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    if structured:
        nn.init.constant_(part.group_gate, 0.2)
    of = (x, *adapters.parameters())
    torch.manual_seed(3)
    D = part.gates(draw=True) * part.difference
    torch.manual_seed(3)
    y = adapters.model.train()(x)
    expected = x.to(D.dtype) @ (layer.weight.to(D.dtype) + D).T + layer.bias
    dy, rounding = torch.randn_like(y), {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert (y - expected).norm() <= rounding * expected.norm()
    for ours, theirs in zip(
        torch.autograd.grad(y, of, dy), torch.autograd.grad(expected, of, dy.to(D.dtype)), strict=True
    ):
        assert (ours - theirs).norm() <= rounding * theirs.norm()


def test_beside_the_input_one_tensor_of_the_weights_size_is_kept():
    model, kept = net()[:1].train(), []
    adapters = attach(model, DiffPruning(targets="0"))
    adapters.follow(torch.optim.SGD(adapters.parameters(), 0.0), 1)
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(3, 6, requires_grad=True))
    assert sorted(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) == [3 * 6, 6 * 8]


def test_a_drawn_gate_is_open_or_shut_as_often_as_its_probability_says():
    torch.manual_seed(0)
    part = attach(nn.Sequential(nn.Linear(300, 300)), DiffPruning(targets="0")).parts("default")["0"]
    nn.init.constant_(part.gate, 0.7)
    share = (part.gates(draw=True) > 0).float().mean().item()
    assert share == pytest.approx(torch.tensor(0.7).sigmoid().item(), abs=0.01)


def test_the_penalty_shuts_gates():
    _, without, _ = trained(budget=1.0, l0_weight=1e-9, gate_start=0.0)
    _, with_it, _ = trained(budget=1.0, l0_weight=0.1, gate_start=0.0)
    count = [sum(p.expected_entries().item() for p in a.parts("default").values()) for a in (without, with_it)]
    assert count[1] < 0.9 * count[0]


def test_after_its_share_of_the_steps_the_largest_differences_stay_and_are_trained_on():
    model, adapters, x = trained(budget=0.25, prune_after=0.5)
    kept = {name: part.weight_delta(slice(None)) != 0 for name, part in adapters.parts("default").items()}
    assert sum(int(mask.sum()) for mask in kept.values()) == (6 * 8 + 8 * 4) // 4
    more, _, _ = trained(steps=5, budget=0.25, prune_after=1.0)
    assert not torch.equal(model(x), more(x))


def test_a_saved_adapter_holds_the_kept_entries_alone(tmp_path):
    model, adapters, x = trained(budget=0.1, prune_after=0.5)
    adapters.save(tmp_path / "folder")
    again = net().eval()
    theirs = load(again, tmp_path / "folder")
    assert sum(p.numel() for p in theirs.parameters()) == 8  # a tenth of 80
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)
    theirs.save(tmp_path / "twice")
    load(net(), tmp_path / "twice")


def test_before_that_it_is_saved_whole(tmp_path):
    attach(net(), DiffPruning(targets=Targets.of_type(nn.Linear))).save(tmp_path / "folder")
    assert sum(p.numel() for p in load(net(), tmp_path / "folder").parameters()) == 2 * 80


def test_training_without_follow_is_refused():
    model = net().train()
    attach(model, DiffPruning(targets="0"))
    with pytest.raises(ConfigError, match="follow"):
        model(torch.randn(2, 6))


def test_settings_that_cannot_be_are_refused():
    for settings in ({"budget": 0}, {"prune_after": 2}, {"l0_weight": -1}, {"gate_start": float("inf")}):
        with pytest.raises(ConfigError):
            DiffPruning(**settings)


def test_the_parameter_count_is_that_of_the_formula():
    adapters = attach(net(), DiffPruning(targets=Targets.of_type(nn.Linear), structured=True))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (6 * 8 + 8 * 4) + 2
