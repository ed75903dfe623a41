"""Full-weight changes by hand-written backwards: against autograd in float64, and what they keep."""

import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.core.method import Method
from smidgen.methods.fourierft import FourierFT
from smidgen.methods.frod import FRoD
from smidgen.methods.glora import GLoRA
from smidgen.methods.hira import HiRA
from smidgen.methods.loha import LoHa
from smidgen.methods.randlora import RandLoRA
from smidgen.methods.shira import SHiRA
from smidgen.methods.supertuning import SuperTuning
from smidgen.methods.vera import VeRA
from smidgen.methods.waveft import WaveFT

EVERYTHING = slice(None)
METHODS = [
    FourierFT(frequencies=40, targets="0"),
    GLoRA(rank=3, targets="0"),
    HiRA(rank=3, targets="0"),
    LoHa(rank=3, targets="0"),
    LoHa(rank=1, targets="0"),
    VeRA(rank=3, targets="0"),
    VeRA(rank=200, targets="0"),
    SHiRA(rank=1, targets="0"),
    WaveFT(frequencies=40, targets="0"),
    WaveFT(frequencies=40, wavelet="db3", targets="0"),
    SuperTuning(sparsity=0.95, targets="0"),
    SuperTuning(sparsity=0.95, rank=2, targets="0"),
    SuperTuning(sparsity=0.4, rank=2, targets="0"),
    FRoD(density=0.04, targets="0"),
    FRoD(density=0.4, targets="0"),
    RandLoRA(rank=3, alpha=3, targets="0"),
]


def moved(method: Method, fan_in: int, fan_out: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, list]:
    model = nn.Sequential(nn.Linear(fan_in, fan_out).to(dtype))
    adapters = attach(model, method, seed=0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    return model, list(adapters.parameters())


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(("fan_in", "fan_out"), [(6, 9), (9, 6), (7, 7), (600, 300)])  # the last is made in blocks
@pytest.mark.parametrize("tokens", [2, 400])
def test_gradients_are_those_of_the_merged_weight(method: Method, fan_in: int, fan_out: int, tokens: int):
    model, parameters = moved(method, fan_in, fan_out)
    x = torch.randn(1, tokens, fan_in, dtype=torch.float64, requires_grad=True)
    part = model[0].smidgen.get_submodule("default")
    change = part.bias_delta(EVERYTHING)
    y, expected = model(x), x @ (model[0].weight + part.weight_delta(EVERYTHING)).T + model[0].bias
    expected = expected if change is None else expected + change
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-10)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(of, [x, *parameters], dy) for of in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_are_those_of_finite_differences(method: Method):
    model, parameters = moved(method, 6, 9)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters))


@pytest.mark.parametrize("method", [*METHODS[:3], LoHa(rank=4, targets="0"), SHiRA(rank=1, targets="0")], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_weights_size_is_kept(method: Method, dtype: torch.dtype):
    model, _ = moved(method, 40, 50, dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 40, dtype=dtype, requires_grad=True))
    weight = model[0].weight
    own = weight.untyped_storage().data_ptr()
    assert all(t.numel() < weight.numel() or t.untyped_storage().data_ptr() == own for t in kept)
