"""DEFT against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError
from smidgen.methods.deft import DEFT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("settings", [{}, {"decomposition": "qr"}, {"alpha": 6.0}, {"para": True}])
def test_a_subspace_is_replaced(settings):
    layer, x = nn.Linear(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), DEFT(rank=3, targets="0", **settings), seed=0)
    part = adapters.parts("default")["0"]
    for p in part.parameters():
        nn.init.normal_(p)
    Q = torch.linalg.qr(part.P0)[0] if "decomposition" in settings else part.P0
    P = Q if "decomposition" in settings else Q.relu()
    put_in = 0 if "para" in settings else (2.0 if "alpha" in settings else 1.0) * Q @ part.R
    W = (torch.eye(6, dtype=torch.float64) - Q @ P.T) @ layer.weight + put_in
    torch.testing.assert_close(adapters.model(x), F.linear(x, W, layer.bias), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rank", "K"), [(2, 2), (9, 6)])
def test_it_trains_a_basis_and_what_is_put_in(rank: int, K: int):
    adapters = attach(nn.Sequential(nn.Linear(4, 6)), DEFT(rank=rank, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == K * (6 + 4)
    adapters = attach(nn.Sequential(nn.Linear(4, 6)), DEFT(rank=rank, targets="0", para=True))
    assert sum(p.numel() for p in adapters.parameters()) == K * 6


def test_dropout_leaves_the_start_at_the_base_model():
    layer, x = nn.Linear(4, 6), torch.randn(9, 4)
    model = attach(nn.Sequential(layer), DEFT(dropout=0.5, targets="0"), seed=0).model.train()
    torch.testing.assert_close(model(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"r": 4, "target_modules": ["q_proj"], "decomposition_method": "qr", "alpha": 6}),
        (llama, {"r": 4, "target_modules": "all-linear", "para": True}),
        (llama, {"r": 40, "target_modules": ["q_proj", "down_proj"], "init_weights": False, "init_scale": 2.0}),
        (gpt2, {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.DeftConfig(**config))


@pytest.mark.parametrize("settings", [{}, {"decomposition": "qr", "alpha": 6.0}, {"para": True}])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, settings):
    to_peft_and_back(make, DEFT(rank=4, **settings), says={"r": 4, "para": "para" in settings})


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match='decomposition is "svd"'):
        DEFT(decomposition="svd")
    with pytest.raises(ConfigError, match="alpha is 0"):
        DEFT(alpha=0)
