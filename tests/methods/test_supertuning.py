"""Super-Tuning against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError, TargetError
from smidgen.core.safe import write_tensors
from smidgen.methods.supertuning import SuperTuning

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def attached(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5).double())
    part = attach(model, SuperTuning(targets="0", **settings)).parts("default")["0"]
    for p in part.parameters():
        nn.init.normal_(p)
    return model, part


@pytest.mark.parametrize("largest", [True, False])
def test_it_changes_the_largest_entries_of_the_weight_or_the_smallest(largest: bool):
    model, part = attached(sparsity=0.75, largest=largest)
    W = model[0].weight
    order = W.abs().flatten().argsort(descending=largest)[:7]  # a quarter of 30
    assert set(part.indices.tolist()) == set(order.tolist())
    expected = W.flatten().clone()
    expected[part.indices.long()] += part.values
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ expected.view(5, 6).T + model[0].bias, rtol=0, atol=1e-14)


def test_with_a_rank_lora_is_added_with_alpha_of_twice_the_rank():
    for settings, scale in (({"rank": 2}, 2.0), ({"rank": 2, "alpha": 3.0}, 1.5)):
        model, part = attached(sparsity=0.8, **settings)
        D = part.sparse_delta(slice(None)) + scale * part.B @ part.A
        x = torch.randn(3, 6, dtype=torch.float64)
        torch.testing.assert_close(model(x), x @ (model[0].weight + D).T + model[0].bias, rtol=0, atol=1e-13)


def test_dropout_is_on_the_low_rank_part_alone():
    torch.manual_seed(1)
    model, part = attached(sparsity=0.8, rank=2, dropout=0.5)
    x = torch.randn(2000, 6, dtype=torch.float64)
    without = x @ (model[0].weight + part.sparse_delta(slice(None))).T + model[0].bias
    dropped, whole = model(x) - without, model.eval()(x) - without
    assert (dropped - whole).abs().max() > 0.1
    slope = (dropped * whole).sum() / whole.square().sum()
    assert abs(slope - 1) < 0.1


def test_the_parameter_count_is_that_of_the_formula():
    assert sum(p.numel() for p in attached(sparsity=0.75, rank=2)[1].parameters()) == 7 + 2 * (6 + 5)


def test_settings_and_places_that_cannot_be_are_refused():
    for settings in ({"sparsity": 1.0}, {"rank": 0}, {"alpha": 2.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError):
            SuperTuning(**settings)
    with pytest.raises(TargetError, match="leaves none of its 20 entries"):
        attach(nn.Sequential(nn.Linear(4, 5)), SuperTuning(targets="0"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparsity": 0.9, "select_top": False},
        {"r": 3, "lora_alpha": 5.0, "lora_dropout": 0.1},
        {"r": 2},
        {"save_precomputed_indices": False},
    ],
)
def test_folders_of_hf_peft_are_read(settings):
    from_peft(llama, peft.SupertuningConfig(target_modules=["q_proj", "v_proj"], **settings), change=_noise)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.9}, {"rank": 2}, {"save_indices": False, "largest": False, "sparsity": 0.5}]
)
def test_hf_peft_reads_ours(settings):
    to_peft_and_back(llama, SuperTuning(targets=Targets("*.q_proj", "*.v_proj"), **settings))


def test_entries_outside_the_weight_are_refused(tmp_path):
    peft.get_peft_model(llama(), peft.SupertuningConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "indices" in key:
            tensor[3] = 1024
    (tmp_path / "adapter_model.safetensors").unlink()
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(FolderError, match="inside a weight of 32 x 32"):
        load(llama(), tmp_path)


@torch.no_grad()
def _noise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
