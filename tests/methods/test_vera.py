"""VeRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smidgen import Targets, attach
from smidgen.methods.vera import VeRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import Mixture, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).double()


def test_the_change_is_equation_2_with_matrices_cut_to_the_layer():
    adapters = attach(two_layers(), VeRA(rank=7, targets=Targets.of_type(nn.Linear)), seed=0)
    first, second = adapters.parts("default").values()
    assert first.shared is second.shared
    assert first.shared.A.shape == (7, 5)
    assert first.shared.B.shape == (5, 7)
    for part, O, I in ((first, 5, 3), (second, 4, 5)):
        nn.init.normal_(part.lambda_b)
        nn.init.normal_(part.lambda_d)
        A, B = first.shared.A[:, :I], first.shared.B[:O]
        expected = torch.diag(part.lambda_b) @ B @ torch.diag(part.lambda_d) @ A
        torch.testing.assert_close(part.weight_delta(slice(None)), expected, rtol=0, atol=1e-14)


def test_it_trains_r_plus_o_numbers_per_site_and_neither_matrix():
    adapters = attach(two_layers(), VeRA(rank=7, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == (7 + 5) + (7 + 4)


def test_the_random_matrix_of_the_inputs_costs_no_gradient():
    adapters = attach(two_layers(), VeRA(rank=7, targets=Targets.of_type(nn.Linear)))
    A, B = adapters.parts("default")["0"].factors()
    assert (A.requires_grad, B.requires_grad) == (False, True)


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"r": 3, "target_modules": "all-linear", "projection_prng_key": 5, "d_initial": 0.2}),
        (gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "vera_dropout": 0.1}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, save_projection):
    from_peft(make, peft.VeraConfig(**config, save_projection=save_projection))


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, save_projection):
    method = VeRA(rank=6, seed=3, save_projection=save_projection)
    to_peft_and_back(make, method, says={"r": 6, "projection_prng_key": 3, "save_projection": save_projection})


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_matrices_stand_once_in_the_file_or_not_at_all(tmp_path, save_projection):
    attach(two_layers(), VeRA(rank=7, save_projection=save_projection, targets=Targets.of_type(nn.Linear))).save(
        tmp_path / "folder"
    )
    keys = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert {key for key in keys if "vera_A" in key or "vera_B" in key} == (
        {"base_model.vera_A", "base_model.vera_B"} if save_projection else set()
    )


def test_stacked_experts_share_the_matrices_and_have_their_own_scales():
    adapters = attach(Mixture(), VeRA(rank=4, targets=Targets("experts").parameter("up")), seed=0)
    part = next(iter(adapters.parts("default").values()))
    nn.init.normal_(part.lambda_b)
    delta = part.weight_delta(slice(None)).view(3, 8, 6)
    b, d = part.lambda_b.view(3, 8), part.lambda_d.view(3, 4)
    for expert in range(3):
        expected = b[expert][:, None] * part.shared.B * d[expert] @ part.shared.A
        torch.testing.assert_close(delta[expert], expected)
