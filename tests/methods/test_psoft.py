"""PSOFT against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.psoft import PSOFT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("sharing", ["psoft_init", "pissa_init"])
def test_the_principal_part_of_the_weight_is_turned_and_scaled(sharing: str):
    layer, x, rank = nn.Linear(6, 5).double(), torch.randn(4, 6).double(), 3
    adapters = attach(nn.Sequential(layer), PSOFT(rank=rank, sharing=sharing, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    q, Q, eye = part.R.tolist(), torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    Q[0, 1], Q[0, 2], Q[1, 2] = q
    Q = Q - Q.T
    R = part.b.diag() @ (eye + Q) @ torch.linalg.inv(eye - Q) @ part.a.diag()
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    left, right = (U @ S.diag(), Vh) if sharing == "psoft_init" else (U @ S.sqrt().diag(), S.sqrt().diag() @ Vh)
    expected = x @ (layer.weight + left @ (R - eye) @ right).T + layer.bias
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-12)


def test_a_turn_alone_keeps_lengths_and_angles_of_the_principal_part():
    layer = nn.Linear(6, 5).double()
    method = PSOFT(rank=5, scale_input=False, scale_output=False, targets="0")
    part = attach(nn.Sequential(layer), method, seed=0).parts("default")["0"]
    nn.init.normal_(part.R)
    W, _ = part.merged(layer.weight.detach(), None, slice(None))
    assert (W - layer.weight).norm() > 0.1
    torch.testing.assert_close(W @ W.T, layer.weight @ layer.weight.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 6 + 4 + 4), ({"orthogonal": False}, 16 + 4 + 4), ({"scale_input": False, "scale_output": False}, 6)],
)
def test_it_trains_the_turn_and_two_vectors(settings, count: int):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))
    adapters = attach(model, PSOFT(rank=4, **settings, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * count


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="cannot be turned"):
        PSOFT(rank=1, scale_input=False, scale_output=False)
    with pytest.raises(TargetError, match="rank 4 is more than its 3 x 5 weight has"):
        attach(nn.Sequential(nn.Linear(5, 3)), PSOFT(rank=4, targets="0"))


CONFIGS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "ab_svd_init": "pissa_init", "psoft_alpha": 3, "psoft_mag_a": False},
    {"target_modules": "all-linear", "psoft_orth": False, "psoft_mag_b": False, "psoft_dropout": 0.1},
    {"target_modules": ["q_proj", "up_proj"], "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 5},
    {"target_modules": ["v_proj"], "use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
    {"target_modules": "all-linear", "use_cayley_neumann": True, "cayley_neumann_eps": 0.2},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.PsoftConfig(r=4, **config))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sharing": "pissa_init", "svd": "lowrank", "seed": 3, "scale_output": False},
        {"cayley_neumann": True, "terms": 7, "eps": 0.5, "orthogonal": True},
    ],
    ids=str,
)
def test_hf_peft_reads_ours(settings):
    to_peft_and_back(llama, PSOFT(rank=4, **settings), says={"r": 4})
