"""MiSS against its equations, block by block in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.miss import MiSS

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("settings", [{}, {"variant": "mini", "mini_rank": 2}], ids=str)
def test_every_shard_of_the_inputs_has_the_same_matrix(settings):
    layer, x = nn.Linear(8, 6).double(), torch.randn(4, 8).double()
    adapters = attach(nn.Sequential(layer), MiSS(rank=3, **settings, targets="0"), seed=0)
    D = adapters.parts("default")["0"].D
    nn.init.normal_(D)
    W = layer.weight.detach().clone()
    for o in range(6):
        for i in range(8):  # the last shard is two wide
            W[o, i] += D[i % 3, o % D.shape[1]].item()
    torch.testing.assert_close(adapters.model(x), x @ W.T + layer.bias, rtol=0, atol=1e-12)


def test_bat_changes_every_block_by_itself():
    layer, x, R = nn.Linear(6, 4).double(), torch.randn(4, 6).double(), 2
    adapters = attach(nn.Sequential(layer), MiSS(rank=R, variant="bat", targets="0"), seed=0)
    D = adapters.parts("default")["0"].D
    nn.init.normal_(D)
    W, eye = layer.weight.detach().clone(), torch.eye(R, dtype=torch.float64)
    for p in range(2):
        for k in range(3):
            block = W[p * R : (p + 1) * R, k * R : (k + 1) * R]
            block += (block + eye) @ D[p].detach()
    torch.testing.assert_close(adapters.model(x), x @ W.T + layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 4 * (8 + 4)), ({"variant": "mini", "mini_rank": 2}, 2 * 4 * 2), ({"variant": "bat"}, 4 * (8 + 4))],
)
def test_it_trains_one_shard_per_site(settings, count: int):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    adapters = attach(model, MiSS(rank=4, **settings, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == count


def test_what_does_not_divide_is_refused():
    model = nn.Sequential(nn.Linear(6, 9))
    with pytest.raises(TargetError, match="no shard of 64"):
        attach(model, MiSS(targets="0"))
    with pytest.raises(TargetError, match="9 x 6 weight does not divide into 2 x 2"):
        attach(model, MiSS(rank=2, variant="bat", targets="0"))
    with pytest.raises(TargetError, match="no multiple of mini_rank 2"):
        attach(model, MiSS(rank=2, variant="mini", mini_rank=2, targets="0"))
    with pytest.raises(ConfigError, match="it is one of miss, bat, mini"):
        MiSS(variant="bone")


CONFIGS = [
    {"r": 8, "target_modules": ["q_proj", "v_proj"], "miss_dropout": 0.2},
    {"r": 5, "target_modules": "all-linear", "init_weights": False},
    {"r": 8, "target_modules": "all-linear", "init_weights": "bat"},
    {"r": 4, "target_modules": "all-linear", "init_weights": "mini", "mini_r": 8},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.MissConfig(**config))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 5}, {"r": 5, "init_weights": True}),
        ({"rank": 8, "variant": "bat"}, {"init_weights": "bat"}),
        ({"rank": 4, "variant": "mini", "mini_rank": 2}, {"init_weights": "mini", "mini_r": 2}),
    ],
    ids=str,
)
def test_hf_peft_reads_ours(settings, says):
    to_peft_and_back(llama, MiSS(**settings), says=says)
