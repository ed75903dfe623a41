"""Any adapter that changes weights as a plain LoRA: exactly, or with the error said."""

import pytest
import torch
from torch import Tensor, nn

from smidgen import LoRA, Stack, Targets, Weighted, attach
from smidgen.conversion import to_lora
from smidgen.core.errors import AttachError, NotMergeable
from smidgen.core.method import Method
from smidgen.methods.bitfit import BitFit
from smidgen.methods.fourierft import FourierFT
from smidgen.methods.ia3 import IA3

ALL = Targets("0", "2", "4")


def net(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 8, 3, padding=1, groups=2, bias=bias)
    return nn.Sequential(nn.Linear(5, 5, bias=bias), nn.Tanh(), conv, nn.Tanh(), nn.Linear(5, 7, bias=bias))


def stirred(model: nn.Module, **methods: Method):
    adapters = None
    for name, method in methods.items():
        adapters = attach(model, method, name, seed=0) if adapters is None else adapters.add(method, name, seed=1)
    assert adapters is not None
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return adapters


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 60).view(2, 6, 5))


@pytest.mark.parametrize("method", [LoRA(rank=2, targets=ALL), IA3(targets=ALL), FourierFT(targets=ALL, frequencies=9)])
def test_what_changes_weights_becomes_a_lora_that_does_the_same(method: Method):
    model = net()
    adapters = stirred(model, a=method)
    expected = run(model)
    report = to_lora(adapters)
    adapters.activate("lora")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert max(report.errors.values()) <= 2e-6


def test_a_lora_keeps_its_factors_and_its_rank():
    model = net()
    adapters = stirred(model, a=LoRA(rank=2, alpha=6.0, targets=ALL))
    report = to_lora(adapters)
    assert set(report.ranks.values()) == {2}
    assert set(report.errors.values()) == {0.0}
    assert torch.equal(adapters.parts("lora")["0"].A, adapters.parts("a")["0"].A)


@pytest.mark.parametrize("expression", [Weighted(a=0.5, b=-1.0), Stack("a", "b")])
def test_a_mix_becomes_one_lora(expression):
    model = net()
    adapters = stirred(model, a=LoRA(rank=1, targets=ALL), b=FourierFT(targets=Targets("0"), frequencies=5))
    adapters.activate(expression)
    expected = run(model)
    report = to_lora(adapters)
    adapters.activate("lora")
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    assert report.ranks["4"] == 1


def test_a_rank_that_is_asked_for_is_the_best_approximation_and_its_error_is_said():
    model = net()
    adapters = stirred(model, a=FourierFT(targets="4", frequencies=20))
    D = adapters.parts("a")["4"].weight_delta(slice(None)).detach()
    report = to_lora(adapters, rank=2)
    S = torch.linalg.svdvals(D)
    assert report.errors["4"] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    part = adapters.parts("lora")["4"]
    assert float((part.weight_delta(slice(None)) - D).detach().norm()) == pytest.approx(float(S[2:].norm()), rel=1e-4)


def test_a_large_matrix_is_factorised_at_random_and_nearly_as_well(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Linear(120, 110, bias=False))
    adapters = stirred(model, a=FourierFT(targets="0", frequencies=40))
    direct = to_lora(adapters, name="direct", rank=8).errors["0"]
    monkeypatch.setattr("smidgen.conversion._DIRECT", 0)
    assert to_lora(adapters, name="random", rank=8).errors["0"] <= 1.05 * direct


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (BitFit(targets=ALL), "the bias is changed"),
        (IA3(targets=ALL), "the bias is changed"),
        (LoRA(rank=2, targets="0", heads=("4",)), "trains modules whole"),
    ],
)
def test_what_a_lora_cannot_do_is_refused_and_nothing_is_added(method: Method, why: str):
    adapters = stirred(net(bias=True), a=method)
    with pytest.raises(NotMergeable, match=why):
        to_lora(adapters)
    assert adapters.names == ["a"]


def test_an_adapter_that_does_nothing_yet_is_refused():
    adapters = attach(net(), FourierFT(targets=ALL, frequencies=3), "a")
    with pytest.raises(AttachError, match="changes nothing yet"):
        to_lora(adapters)
