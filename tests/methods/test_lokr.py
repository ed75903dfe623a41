"""LoKr against torch.kron in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError
from smidgen.methods.lokr import LoKr, kronecker, split

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import llama
from .test_loha import IDS, _net, _noise

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class _Square(nn.Module):
    """A convolution with a square kernel; input (B, 5) of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.square(torch.linspace(-1, 1, 2 * 6 * 25).sin().view(2, 6, 5, 5) + ids[:, :1, None, None])


def _square() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Square().eval()


def attached(layer: nn.Module, **settings):
    model = nn.Sequential(layer.double())
    part = attach(model, LoKr(targets="0", **settings)).parts("default")["0"]
    for number, p in enumerate(part.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
    return model, part


@pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": 9}, {"rank": 1, "decompose_both": True}, {"factor": 2}])
def test_a_linear_layer_runs_by_the_kronecker_product(settings):
    model, part = attached(nn.Linear(12, 20), alpha=3.0, **settings)
    W1 = part.W1 if part.W1 is not None else part.B1 @ part.A1
    W2 = part.W2 if part.W2 is not None else part.B2 @ part.A2
    D = 3.0 / settings.get("rank", 8) * torch.kron(W1, W2)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(part.weight_delta(slice(None)), D, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), x @ (model[0].weight + D).T + model[0].bias, rtol=0, atol=1e-12)


def test_the_backward_by_hand_keeps_the_input_alone():
    x, W1, W2 = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(7, 3, 4), (2, 3), (5, 4)])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kronecker(x, W1, W2)
    torch.testing.assert_close(y, torch.einsum("ac,ncd,bd->nab", W1, x, W2))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, W1, W2)}
    assert torch.autograd.gradcheck(kronecker, (x, W1, W2))
    assert torch.autograd.gradgradcheck(kronecker, (x, W1, W2))


def test_a_second_factor_much_wider_than_the_rank_stays_apart():
    model, part = attached(nn.Linear(60, 80), rank=1, factor=2)
    x = torch.randn(3, 60, dtype=torch.float64)
    D = 8.0 * torch.kron(part.W1, part.B2 @ part.A2)
    torch.testing.assert_close(model(x), x @ (model[0].weight + D).T + model[0].bias, rtol=0, atol=1e-11)


def test_on_a_convolution_the_kernel_belongs_to_the_second_factor():
    for settings in ({"rank": 9}, {"rank": 1}, {"rank": 1, "effective_conv": True}):
        _, part = attached(nn.Conv2d(6, 8, (2, 3)), alpha=1.0, **settings)
        if part.T2 is not None:
            W2 = torch.einsum("ijkl,oi,jc->ockl", part.T2, part.B2, part.A2)
        else:
            W2 = (part.W2 if part.W2 is not None else part.B2 @ part.A2).view(4, 3, 2, 3)
        D = torch.kron(part.W1[:, :, None, None], W2).flatten(1) / settings["rank"]
        torch.testing.assert_close(part.weight_delta(slice(None)), D, rtol=0, atol=1e-12)


def test_dimensions_are_split_as_hf_peft_splits_them():
    for dimension in (*range(1, 130), 768, 1000, 1024, 3072, 11008):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 64):
            assert split(dimension, factor) == factorization(dimension, factor), (dimension, factor)


def test_the_parameter_counts_are_those_of_the_formulas():
    def count(**settings):
        return sum(p.numel() for p in attached(nn.Linear(32, 64), **settings)[1].parameters())

    # 64 = 8 * 8, 32 = 4 * 8
    assert count(rank=2) == 8 * 4 + 2 * (8 + 8)
    assert count(rank=4) == 8 * 4 + 8 * 8
    assert count(rank=2, decompose_both=True) == 2 * (8 + 4) + 2 * (8 + 8)
    assert count(rank=2, factor=2) == 2 * 2 + 2 * (32 + 16)


@pytest.mark.parametrize("rescale", [False, True])
def test_rank_dropout_drops_output_channels_and_scales_if_asked(rescale: bool):
    torch.manual_seed(0)
    model, part = attached(nn.Linear(4, 60), rank_dropout=0.4, rescale_dropped=rescale)
    x = torch.randn(6, 4, dtype=torch.float64)
    change = x @ part.weight_delta(slice(None)).T
    ratio = ((model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)) / change).mean(0)
    kept = (ratio > 0.5).double()
    assert 10 < kept.sum() < 55
    torch.testing.assert_close(ratio, kept / kept.mean() if rescale else kept, rtol=1e-6, atol=1e-9)


def test_settings_that_cannot_be_are_refused():
    for settings in ({"rank": 0}, {"factor": 0}, {"factor": 1.5}):
        with pytest.raises(ConfigError):
            LoKr(**settings)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 1, "target_modules": "all-linear", "decompose_both": True, "decompose_factor": 8},
        {"r": 1, "target_modules": "all-linear", "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"k_proj": 5}},
        {"r": 2, "target_modules": ["q_proj"], "rank_dropout": 0.1, "rank_dropout_scale": True, "module_dropout": 0.2},
        {"r": 2, "target_modules": ["q_proj"], "init_weights": "lycoris"},
    ],
)
def test_folders_of_hf_peft_on_linear_layers_are_read(config):
    from_peft(llama, peft.LoKrConfig(**config), change=_noise)


ON_CONVOLUTIONS = [  # HF PEFT fails to run a core of rank 1 on a Conv1d
    (_net, {"rank": 1, "factor": 2}),
    (_net, {"rank": 2, "factor": 1, "effective_conv": True}),
    (_square, {"rank": 1, "factor": 2, "effective_conv": True}),
    (_square, {"rank": 8}),
]


@pytest.mark.parametrize(("make", "settings"), ON_CONVOLUTIONS)
def test_folders_of_hf_peft_on_convolutions_are_read(make, settings):
    theirs = {LoKr.disk.fields[name]: value for name, value in settings.items()}
    config = peft.LoKrConfig(alpha=3, target_modules=["conv", "image", "up", "square"], **theirs)
    from_peft(make, config, run=run_on(IDS), change=_noise)


def test_a_conv1d_of_hf_peft_with_a_whole_second_factor_is_refused(tmp_path):
    peft.get_peft_model(_net(), peft.LoKrConfig(r=8, target_modules=["conv"])).save_pretrained(tmp_path)
    with pytest.raises(FolderError, match="no Kronecker product"):
        load(_net(), tmp_path)


def test_ours_on_such_a_layer_is_written_in_our_layout(tmp_path):
    model = _net()
    adapters = attach(model, LoKr(rank=8, targets="conv"), seed=0)
    _noise(model)
    adapters.save(tmp_path / "folder")
    assert "W2 is whole" in (tmp_path / "folder/smidgen.json").read_text()
    again = _net()
    load(again, tmp_path / "folder")
    assert torch.equal(again(IDS), model(IDS))


def test_hf_peft_reads_ours():
    method = LoKr(rank=1, alpha=20.0, factor=4, decompose_both=True, rank_pattern={"*.0.*": 9})
    to_peft_and_back(llama, method, says={"decompose_factor": 4, "decompose_both": True})


@pytest.mark.parametrize(("make", "settings"), ON_CONVOLUTIONS)
def test_hf_peft_reads_our_convolutions(make, settings):
    names = ["square"] if make is _square else ["conv", "image", "up"]
    to_peft_and_back(make, LoKr(alpha=30.0, targets=Targets(*names), **settings), run=run_on(IDS))
