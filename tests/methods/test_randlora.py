"""RandLoRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smidgen import Targets, attach
from smidgen.methods.randlora import RandLoRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def moved(I: int, O: int, **settings) -> tuple[nn.Module, "torch.nn.Module"]:
    model = nn.Sequential(nn.Linear(I, O).double())
    part = attach(model, RandLoRA(targets="0", **settings), seed=0).parts("default")["0"]
    nn.init.normal_(part.scales)
    nn.init.normal_(part.gains)
    return model, part


@pytest.mark.parametrize(("I", "O"), [(4, 7), (7, 4)])
def test_the_change_is_the_papers_sum_over_bases(I: int, O: int):
    _, part = moved(I, O, rank=2, alpha=6.0)
    l, g, A = part.scales, part.gains, part.shared.A[:, 0]
    C = part.shared.B.flatten(1).view(7, 2, 2)  # (M, R, n): each basis takes R columns of its own
    total = sum(C[:, :, j] @ torch.diag(l[:, j]) @ A @ torch.diag(g[j]) for j in range(2))
    expected = 3.0 * (total if O > I else total.T)
    torch.testing.assert_close(part.weight_delta(slice(None)), expected, rtol=0, atol=1e-12)


def test_it_trains_n_times_r_plus_m_numbers_per_site_and_can_reach_full_rank():
    adapters = attach(nn.Sequential(nn.Linear(7, 11)), RandLoRA(rank=3, targets="0"))
    n = math.ceil(7 / 3)
    assert sum(p.numel() for p in adapters.parameters()) == n * (3 + 7)
    assert torch.linalg.matrix_rank(moved(7, 11, rank=3)[1].weight_delta(slice(None))) == 7


@pytest.mark.parametrize(("I", "O"), [(4, 7), (7, 4)])
def test_few_and_many_tokens_give_the_same_output_and_gradients(I: int, O: int):
    model, part = moved(I, O, rank=2)
    x, weights = torch.randn(40, I, dtype=torch.float64), torch.randn(40, O, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    many = [p.grad.clone() for p in part.parameters()]
    model.zero_grad()
    few = torch.cat([model(rows) for rows in x.split(4)])
    (few * weights).sum().backward()
    torch.testing.assert_close(few, model(x))
    for p, gradient in zip(part.parameters(), many, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize(("I", "O"), [(30, 70), (70, 30)])
def test_one_activation_is_kept_and_no_basis(I: int, O: int):
    model, _ = moved(I, O, rank=10)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, I, dtype=torch.float64, requires_grad=True))
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) == 2 * 30


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
        (llama, {"r": 4, "target_modules": "all-linear", "projection_prng_key": 5, "randlora_alpha": 30}),
        (llama, {"r": 4, "target_modules": ["q_proj"], "sparse": True, "randlora_dropout": 0.1}),
        (llama, {"r": 4, "target_modules": ["q_proj"], "very_sparse": True}),
        (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read_with_a_copy_of_the_matrices_under_every_layer(make, config, save_projection):
    from_peft(make, peft.RandLoraConfig(**config, save_projection=save_projection))


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, save_projection):
    method = RandLoRA(rank=6, seed=3, save_projection=save_projection)
    to_peft_and_back(make, method, says={"r": 6, "projection_prng_key": 3, "save_projection": save_projection})


def test_the_matrices_stand_once_in_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    attach(model, RandLoRA(rank=2, targets=Targets.of_type(nn.Linear))).save(tmp_path / "folder")
    keys = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    assert sorted(key for key in keys if "_A" in key or "_B" in key) == [
        "base_model.randlora_A",
        "base_model.randlora_B",
    ]
