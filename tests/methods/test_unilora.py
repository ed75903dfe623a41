"""Uni-LoRA against its equations in float64, and against Hugging Face PEFT 0.21.2."""

import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import FolderError
from smidgen.methods.unilora import UniLoRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_every_entry_of_every_matrix_is_an_entry_of_one_vector_over_the_root_of_its_count():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).double()
    adapters = attach(model, UniLoRA(rank=2, length=7, targets=Targets.of_type(nn.Linear)), seed=0)
    first, second = adapters.parts("default").values()
    places = torch.cat([i.flatten() for p in (first, second) for i in (p.indices_A, p.indices_B)]).tolist()
    assert len(places) == 2 * (3 + 5) + 2 * (5 + 4)
    counts = [places.count(k) for k in range(7)]
    assert max(counts) - min(counts) <= 1
    t = first.shared.vector
    for part in (first, second):
        A, B = (
            torch.tensor([[t[k] / math.sqrt(counts[k]) for k in row] for row in indices.tolist()], dtype=torch.float64)
            for indices in (part.indices_A, part.indices_B)
        )
        torch.testing.assert_close(part.weight_delta(slice(None)), B @ A, rtol=0, atol=1e-14)


def test_it_trains_one_vector():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    adapters = attach(model, UniLoRA(rank=2, length=7, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == 7


def test_a_vector_longer_than_all_matrices_together_works():
    model = nn.Sequential(nn.Linear(3, 5))
    part = attach(model, UniLoRA(rank=1, length=100, targets="0"), seed=0).parts("default")["0"]
    assert part.scales_A.eq(1).all()
    assert torch.isfinite(part.weight_delta(slice(None))).all()


CONFIGS = [
    (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    (llama, {"r": 3, "target_modules": "all-linear", "theta_d_length": 50, "proj_seed": 5, "unilora_dropout": 0.1}),
    (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize("save_indices", [True, False])
@pytest.mark.parametrize(("make", "config"), CONFIGS)
def test_folders_of_hf_peft_are_read(make, config, save_indices):
    from_peft(make, peft.UniLoraConfig(**config, save_indices=save_indices))


def deep() -> nn.Module:
    """More than ten layers, whose names in the order of the alphabet are not in the model's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)])


@pytest.mark.parametrize("save_indices", [True, False])
def test_places_follow_the_order_of_the_model_not_of_names(save_indices):
    names = [str(number) for number in range(12)]
    x = torch.randn(2, 4)
    config = peft.UniLoraConfig(r=2, target_modules=names, save_indices=save_indices)
    from_peft(deep, config, run=lambda model: model(x))


@pytest.mark.parametrize("save_indices", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make, save_indices):
    method = UniLoRA(rank=3, length=40, seed=3, save_indices=save_indices)
    says = {"r": 3, "theta_d_length": 40, "proj_seed": 3, "save_indices": save_indices}
    to_peft_and_back(make, method, says=says)


def test_a_folder_without_places_holds_the_vector_alone(tmp_path):
    attach(llama(), UniLoRA()).save(tmp_path / "folder")
    assert list(load_file(tmp_path / "folder" / "adapter_model.safetensors")) == ["base_model.unilora_theta_d"]


@pytest.mark.parametrize(
    ("config", "field"),
    [({"target_modules": ".*q_proj"}, "target_modules"), ({"layers_to_transform": [0]}, "layers_to_transform")],
)
def test_a_folder_that_does_not_say_plainly_where_is_refused(config, field):
    with pytest.raises(FolderError, match=field):
        from_peft(llama, peft.UniLoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}))
