"""SHiRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError
from smidgen.core.safe import write_tensors
from smidgen.methods.shira import SHiRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_the_values_are_added_at_their_rows_and_columns():
    model, x = nn.Sequential(nn.Linear(7, 9).double()), torch.randn(2, 7, dtype=torch.float64)
    part = attach(model, SHiRA(rank=2, targets="0")).parts("default")["0"]
    nn.init.normal_(part.values)
    W = model[0].weight.clone()
    for value, o, i in zip(part.values, *part.indices.tolist(), strict=True):
        W[o, i] += value
    torch.testing.assert_close(model(x), x @ W.T + model[0].bias, rtol=0, atol=1e-14)


def test_it_trains_as_many_numbers_as_lora_of_its_rank():
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 8))
    adapters = attach(model, SHiRA(rank=2, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (7 + 9) + 2 * (9 + 8)
    for part in adapters.parts("default").values():
        assert len(set(zip(*part.indices.tolist(), strict=True))) == len(part.values)


def test_the_seed_decides_the_entries():
    def indices(seed: int):
        adapters = attach(nn.Sequential(nn.Linear(7, 9)), SHiRA(rank=1, seed=seed, targets="0"))
        return adapters.parts("default")["0"].indices

    assert torch.equal(indices(3), indices(3))
    assert not torch.equal(indices(3), indices(4))


def test_a_mask_says_which_entries_are_trained_and_comes_back_from_disk(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[1, 2] = mask[4, 0] = True
    adapters = attach(model, SHiRA(masks={"0": mask}, targets="0"))
    part = adapters.parts("default")["0"]
    assert part.indices.tolist() == [[1, 4], [2, 0]]
    nn.init.ones_(part.values)
    adapters.save(tmp_path / "folder")
    assert "2 entries" in (tmp_path / "folder/smidgen.json").read_text()  # so our own layout
    again = nn.Sequential(nn.Linear(4, 5))
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "smidgen" not in k})
    load(again, tmp_path / "folder")
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))


def test_what_cannot_be_is_refused():
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(ConfigError, match="288 entries of a weight of 20"):
        attach(model, SHiRA(targets="0"))
    for mask in (torch.ones(4, 5, dtype=torch.bool), torch.zeros(5, 4, dtype=torch.bool), torch.tensor([[1], [4]])):
        with pytest.raises(ConfigError, match=r"at 0|of 0"):
            attach(model, SHiRA(masks={"0": mask}, targets="0"))


@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 4, "random_seed": 7}])
def test_folders_of_hf_peft_are_read(settings):
    from_peft(llama, peft.ShiraConfig(target_modules=["q_proj", "v_proj"], **settings))


def test_masks_of_hf_peft_are_read():
    config = peft.ShiraConfig(r=2, target_modules=["q_proj"], mask_type="first")
    config.mask_fn = lambda layer, r, **_: (torch.arange(32 * 32) < 128).view(32, 32).float()
    adapters = from_peft(llama, config)
    assert next(iter(adapters.parts("default").values())).indices[0].max() == 3


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, SHiRA(rank=3, targets=Targets("*.q_proj", "*.v_proj")), says={"r": 3})


def test_entries_outside_the_weight_are_refused(tmp_path):
    peft.get_peft_model(llama(), peft.ShiraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "indices" in key:
            tensor[1, 3] = 99
    (tmp_path / "adapter_model.safetensors").unlink()
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(FolderError, match="inside a weight of 32 x 32"):
        load(llama(), tmp_path)
