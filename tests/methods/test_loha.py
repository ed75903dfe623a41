"""LoHa against its equations in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError
from smidgen.methods.loha import LoHa, ThinLoHa, WholeLoHa

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import Net, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def attached(layer: nn.Module, **settings):
    model = nn.Sequential(layer.double())
    part = attach(model, LoHa(targets="0", **settings)).parts("default")["0"]
    for number, p in enumerate(part.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    return model, part


@pytest.mark.parametrize(("rank", "kind"), [(1, ThinLoHa), (3, WholeLoHa)])
def test_the_change_is_the_product_of_every_entry_of_two_low_rank_matrices(rank: int, kind: type):
    model, part = attached(nn.Linear(4, 5), rank=rank, alpha=6.0)
    assert type(part) is kind
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for o in range(5):
        for i in range(4):
            one = sum(part.B1[o, r] * part.A1[r, i] for r in range(rank))
            other = sum(part.B2[o, r] * part.A2[r, i] for r in range(rank))
            expected[o, i] = 6.0 / rank * one * other
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(part.weight_delta(slice(None)), expected, rtol=0, atol=1e-12)
    bare = x @ (model[0].weight + expected).T + model[0].bias
    torch.testing.assert_close(model(x), bare, rtol=0, atol=1e-12)


def test_a_core_carries_the_kernel_as_in_proposition_3():
    _, part = attached(nn.Conv2d(4, 5, (2, 3)), rank=2, alpha=2.0, effective_conv=True)
    whole = [
        torch.einsum("ijkl,oi,jc->ockl", T, B, A)
        for T, B, A in ((part.T1, part.B1, part.A1), (part.T2, part.B2, part.A2))
    ]
    torch.testing.assert_close(part.weight_delta(slice(None)), (whole[0] * whole[1]).flatten(1), rtol=0, atol=1e-12)


def test_the_parameter_counts_are_those_of_the_formulas():
    def count(layer: nn.Module, **settings):
        return sum(p.numel() for p in attached(layer, **settings)[1].parameters())

    assert count(nn.Linear(7, 9), rank=3) == 2 * 3 * (7 + 9)
    assert count(nn.Conv2d(4, 6, 3), rank=2) == 2 * 2 * (4 * 9 + 6)
    assert count(nn.Conv2d(4, 6, 3), rank=2, effective_conv=True) == 2 * 2 * (4 + 6 + 2 * 9)
    assert count(nn.Conv2d(4, 6, 1), rank=2, effective_conv=True) == 2 * 2 * (4 + 6)


def test_rank_dropout_drops_output_channels_and_keeps_their_mean():
    torch.manual_seed(0)
    model, part = attached(nn.Linear(4, 50), rank=3, rank_dropout=0.4)
    x = torch.randn(6, 4, dtype=torch.float64)
    change = x @ part.weight_delta(slice(None)).T
    ratio = ((model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)) / change).mean(0)
    kept = ratio > 0.5
    assert 10 < kept.sum() < 45
    torch.testing.assert_close(ratio, kept.double() / kept.double().mean(), rtol=1e-6, atol=1e-9)
    model.eval()
    torch.testing.assert_close(model(x), x @ (model[0].weight.T) + change + model[0].bias)


def test_module_dropout_leaves_the_base_alone_in_some_steps():
    torch.manual_seed(0)
    model, _ = attached(nn.Linear(4, 5), rank=1, module_dropout=0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    bare = [torch.equal(model(x), base) for _ in range(50)]
    assert 10 < sum(bare) < 40


def test_all_channels_dropped_is_no_change_and_not_nan():
    model, _ = attached(nn.Linear(4, 2), rank=1, rank_dropout=0.999)
    assert torch.isfinite(model(torch.randn(2, 4, dtype=torch.float64))).all()


def test_settings_that_cannot_be_are_refused():
    for settings in ({"rank": 0}, {"rank_pattern": {"*": 1.5}}, {"alpha": float("nan")}, {"module_dropout": 1.0}):
        with pytest.raises(ConfigError):
            LoHa(**settings)


IDS = torch.arange(10).view(2, 5)
CONVS = ["conv", "image", "grouped", "up"]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "target_modules": "all-linear", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 5}},
        {"r": 3, "target_modules": ["q_proj"], "rank_dropout": 0.1, "module_dropout": 0.2},
    ],
)
def test_folders_of_hf_peft_on_linear_layers_are_read(config):
    from_peft(llama, peft.LoHaConfig(**config), change=_noise)


@pytest.mark.parametrize("effective", [False, True])
def test_folders_of_hf_peft_on_convolutions_are_read(effective: bool):
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=CONVS, use_effective_conv2d=effective)
    from_peft(_net, config, run=run_on(IDS), change=_noise)


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, LoHa(rank=3, alpha=20.0, rank_pattern={"*.0.*": 2}, alpha_pattern={"*.v_proj": 30.0}))


@pytest.mark.parametrize("effective", [False, True])
def test_hf_peft_reads_our_convolutions(effective: bool):
    method = LoHa(rank=2, alpha=400.0, effective_conv=effective, targets=Targets(*CONVS))
    to_peft_and_back(_net, method, run=run_on(IDS), says={"use_effective_conv2d": effective})


def _net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


@torch.no_grad()
def _noise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
