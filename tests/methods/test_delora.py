"""DeLoRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.methods.delora import DeLoRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import Mixture, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_the_change_is_the_sum_of_normalised_products_times_the_norms_of_columns():
    layer = nn.Linear(3, 5).double()
    part = attach(nn.Sequential(layer), DeLoRA(rank=2, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.B)
    W, A, B = layer.weight, part.A, part.B
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for r in range(2):
        expected += 15.0 / 2 * torch.outer(B[:, r], A[r]) / (A[r].norm() * B[:, r].norm())
    expected = expected * torch.stack([W[:, i].norm() for i in range(3)])
    torch.testing.assert_close(part.weight_delta(slice(None)), expected, rtol=0, atol=1e-12)


def test_each_product_is_as_large_as_the_bound_says_whatever_the_size_of_a_and_b():
    part = attach(nn.Sequential(nn.Linear(3, 5)), DeLoRA(rank=4, bound=2.0, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.B)
    before = part.weight_delta(slice(None))
    with torch.no_grad():
        part.A *= 3
        part.B *= 7
    torch.testing.assert_close(part.weight_delta(slice(None)), before)
    assert (before / part.column_norms).norm() <= 2.0


def test_it_trains_one_number_more_than_lora():
    adapters = attach(nn.Sequential(nn.Linear(3, 5)), DeLoRA(rank=2, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (3 + 5) + 1


def test_every_expert_of_a_stack_has_its_own_bound_and_norms():
    model = Mixture()
    method = DeLoRA(rank=2, targets=Targets("experts").parameter("up"))
    part = next(iter(attach(model, method, seed=0).parts("default").values()))
    nn.init.normal_(part.B)
    nn.init.normal_(part.bound)
    W, A, B = model.experts.up, part.A.view(3, 2, 6), part.B.view(3, 8, 2)
    for expert, change in enumerate(part.weight_delta(slice(None)).view(3, 8, 6)):
        scale = part.bound[expert] / 2 / (A[expert].norm(dim=1) * B[expert].norm(dim=0))
        torch.testing.assert_close(change, B[expert] * scale @ A[expert] * W[expert].norm(dim=0))


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": "all-linear", "delora_lambda": 3, "module_dropout": 0.1},
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "lambda_pattern": {"layers.0.self_attn.v_proj": 5},
        },
    ],
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.DeloraConfig(**config))


def test_hf_peft_reads_ours():
    method = DeLoRA(rank=4, bound=2.0, rank_pattern={"*.0.*": 3}, bound_pattern={"*.q_proj": 5.0})
    to_peft_and_back(llama, method, says={"r": 4, "delora_lambda": 2.0})
