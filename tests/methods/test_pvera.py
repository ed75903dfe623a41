"""PVeRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import FolderError
from smidgen.methods.pvera import PVeRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_training_draws_the_activation_and_inference_takes_its_mean():
    layer = nn.Linear(3, 5).double()
    model = nn.Sequential(layer)
    x = torch.randn(4, 3, dtype=torch.float64)
    base = layer(x).detach()
    adapters = attach(model, PVeRA(rank=6, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.lambda_b)
    nn.init.normal_(part.lambda_d)
    A, B = part.shared.A, part.shared.B
    m, v = (part.lambda_d * (x @ A.T)).chunk(2, dim=-1)
    torch.testing.assert_close(model.eval()(x), base + part.lambda_b * (m @ B.T), rtol=0, atol=1e-13)
    torch.default_generator.manual_seed(4)
    noise = torch.randn(4, 6, dtype=torch.float64)
    torch.default_generator.manual_seed(4)
    expected = base + part.lambda_b * ((m + torch.exp(v / 2) * noise) @ B.T)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_gradients_are_those_of_the_formula_for_the_noise_that_was_drawn(dtype):
    layer = nn.Linear(3, 5).to(dtype)
    adapters = attach(nn.Sequential(layer), PVeRA(rank=6, targets="0"), seed=0)
    part, x = adapters.parts("default")["0"], torch.randn(2, 4, 3, dtype=dtype, requires_grad=True)
    nn.init.normal_(part.lambda_b)
    nn.init.normal_(part.lambda_d)
    of = (x, part.lambda_d, part.lambda_b)
    torch.default_generator.manual_seed(4)
    noise = torch.randn(2, 4, 6, dtype=dtype).double()
    torch.default_generator.manual_seed(4)
    y = adapters.model.train()(x)
    m, v = (part.lambda_d.double() * (x.double() @ part.shared.A.double().T)).chunk(2, dim=-1)
    change = part.lambda_b * ((m + torch.exp(v / 2) * noise) @ part.shared.B.double().T)
    expected = x.double() @ layer.weight.double().T + layer.bias + change
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, of, dy), torch.autograd.grad(expected, of, dy.double()), strict=True
    ):
        assert (ours.double() - theirs).norm() < (1e-13 if dtype == torch.float64 else 0.02) * theirs.norm()


def test_of_an_input_nothing_is_kept_but_what_the_projections_make_of_it():
    model, kept = nn.Sequential(nn.Linear(30, 50)), []
    attach(model, PVeRA(rank=6, targets="0"), seed=0)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(torch.randn(4, 30, requires_grad=True))
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) == 4 * (3 * 6 + 50)


def test_it_trains_2_r_plus_o_numbers_per_site():
    adapters = attach(nn.Sequential(nn.Linear(3, 5)), PVeRA(rank=7, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 7 + 5


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"], "generator_seed": 3}),
        (llama, {"r": 3, "target_modules": "all-linear", "projection_prng_key": 5, "pvera_dropout": 0.1}),
        (gpt2, {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, save_projection):
    from_peft(make, peft.PveraConfig(**config, save_projection=save_projection))


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, save_projection):
    method = PVeRA(rank=6, seed=3, save_projection=save_projection)
    to_peft_and_back(make, method, says={"r": 6, "projection_prng_key": 3, "save_projection": save_projection})


def test_a_folder_that_samples_at_inference_is_refused_by_name():
    with pytest.raises(FolderError, match="sample_at_inference"):
        from_peft(llama, peft.PveraConfig(r=4, target_modules=["q_proj"], sample_at_inference=True))
