"""PEANuT against its network in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, FolderError
from smidgen.methods.peanut import PEANuT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_the_change_is_the_networks_output_for_the_weight():
    layer, x = nn.Linear(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    method = PEANuT(rank=3, depth=2, scale=0.7, non_linearity="silu", targets="0")
    adapters = attach(nn.Sequential(layer), method, seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.B)
    z0 = F.silu(layer.weight.T @ part.A.T)
    z1 = F.silu(z0 @ part.encoders[0].T)
    z2 = F.silu(z1 @ part.encoders[1].T)
    z3 = F.silu(z2 @ part.decoders[0].T) + z1
    z4 = F.silu(z3 @ part.decoders[1].T) + z0
    expected = F.linear(x, layer.weight + 0.7 * (z4 @ part.B.T).T, layer.bias)
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("depth", [0, 3])
def test_it_trains_two_thin_matrices_and_the_layers_between(depth: int):
    adapters = attach(nn.Sequential(nn.Linear(4, 6)), PEANuT(rank=3, depth=depth, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 3 * 6 + 2 * depth * 3**2


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": ["v_proj"], "depth": 2, "act_fn": "gelu_new", "scaling": 0.5},
        {"r": 4, "target_modules": ["v_proj"], "depth": 1, "act_fn": "swish"},
        {"r": 4, "target_modules": ["v_proj"], "depth": 1, "act_fn": "linear"},
    ],
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.PeanutConfig(**config))


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "mish", "none"])
def test_hf_peft_reads_ours(name):
    to_peft_and_back(llama, PEANuT(rank=4, depth=1, targets="*.v_proj", non_linearity=name), says={"r": 4, "depth": 1})


def test_an_unknown_non_linearity_is_refused():
    with pytest.raises(ConfigError, match='non_linearity is "swash"; it is one of relu'):
        PEANuT(non_linearity="swash")
    with pytest.raises(FolderError, match="act_fn is 'quick_gelu'"):
        from_peft(llama, peft.PeanutConfig(target_modules=["v_proj"], act_fn="quick_gelu"))
