"""TinyLoRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smidgen import Targets, attach
from smidgen.methods.tinylora import TinyLoRA

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import Mixture, Net, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def net() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Net()


def test_the_change_lies_between_the_largest_singular_vectors():
    layer = nn.Linear(6, 5).double()
    part = attach(nn.Sequential(layer), TinyLoRA(rank=2, length=3, targets="0"), seed=0).parts("default")["0"]
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    torch.testing.assert_close(part.B @ part.A, U[:, :2] @ torch.diag(S[:2]) @ Vh[:2])
    v = part.shared.v[0]
    nn.init.normal_(v)
    R = v[0] * part.P[0] + v[1] * part.P[1] + v[2] * part.P[2]
    torch.testing.assert_close(part.weight_delta(slice(None)), part.B @ R @ part.A, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("weight_tying", "groups"), [(0.0, 5), (0.5, 2), (1.0, 1)])
def test_neighbouring_sites_share_a_vector_and_u_numbers_are_trained_for_each_group(weight_tying, groups):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    method = TinyLoRA(length=3, weight_tying=weight_tying, targets=Targets.of_type(nn.Linear))
    adapters = attach(model, method)
    assert sum(p.numel() for p in adapters.parameters()) == 3 * groups
    found = [part.group for part in adapters.parts("default").values()]
    assert found == sorted(found)
    assert set(found) == set(range(groups))


def test_experts_of_a_stack_have_singular_vectors_of_their_own():
    model = Mixture()
    part = next(iter(attach(model, TinyLoRA(targets=Targets("experts").parameter("up"))).parts("default").values()))
    for expert in range(3):
        _, _, Vh = torch.linalg.svd(model.experts.up[expert].detach(), full_matrices=False)
        A = nn.functional.normalize(part.A.view(3, 2, 6)[expert])
        torch.testing.assert_close((A @ Vh[:2].T).abs(), torch.eye(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"u": 5, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"r": 3, "u": 5, "target_modules": "all-linear", "projection_seed": 5, "weight_tying": 0.7}),
        (llama, {"u": 5, "target_modules": ["embed_tokens", "v_proj"], "tinylora_dropout": 0.1}),
        (gpt2, {"u": 5, "target_modules": ["c_attn"], "fan_in_fan_out": True, "weight_tying": 1.0}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, save_projection):
    from_peft(make, peft.TinyLoraConfig(**config, save_projection=save_projection))


def deep() -> nn.Module:
    """More than ten layers, whose names in the order of the alphabet are not in the model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])


def test_seeds_and_groups_follow_the_order_of_the_model_not_of_names():
    names, x = [str(number) for number in range(12)], torch.randn(2, 4)
    config = peft.TinyLoraConfig(u=3, target_modules=names, save_projection=False, weight_tying=0.5)
    from_peft(deep, config, run=lambda model: model(x))


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, save_projection):
    method = TinyLoRA(rank=3, length=7, seed=3, weight_tying=0.4, save_projection=save_projection)
    to_peft_and_back(make, method, says={"r": 3, "u": 7, "projection_seed": 3, "weight_tying": 0.4})


@pytest.mark.parametrize("save_projection", [True, False])
def test_hf_peft_reads_ours_on_an_embedding(save_projection):
    method = TinyLoRA(length=7, save_projection=save_projection, targets=Targets("words", "up"))
    to_peft_and_back(net, method, run=run_on(torch.arange(10).view(2, 5)))


def test_matrices_that_follow_from_the_seed_are_left_out_if_so_wished(tmp_path):
    attach(llama(), TinyLoRA(save_projection=False)).save(tmp_path / "folder")
    keys = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert not [key for key in keys if "tinylora_P" in key]
