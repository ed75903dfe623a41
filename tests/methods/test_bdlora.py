"""BD-LoRA against its formula, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.bdlora import BDLoRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_block_of_channels_sees_its_own_ranks_only(which: str):
    layer = nn.Linear(6, 4).double()
    method = BDLoRA(rank=4, alpha=6.0, blocks=2, diagonal_A="0" if which == "A" else (), targets="0")
    adapters = attach(nn.Sequential(layer), method, seed=0)
    part, x = adapters.parts("default")["0"], torch.randn(3, 6, dtype=torch.float64)
    nn.init.normal_(part.B)
    if which == "A":  # (4, 3): two blocks of two ranks, each of three inputs
        h = torch.cat([x[:, :3] @ part.A[:2].T, x[:, 3:] @ part.A[2:].T], 1)
        change = h @ part.B.T
    else:  # (4, 2): two blocks of two outputs, each of two ranks
        h = x @ part.A.T
        change = torch.cat([h[:, :2] @ part.B[:2].T, h[:, 2:] @ part.B[2:].T], 1)
    torch.testing.assert_close(adapters.model(x), x @ layer.weight.T + layer.bias + 1.5 * change)


def test_it_trains_less_than_lora_by_the_number_of_blocks():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    adapters = attach(model, BDLoRA(rank=4, blocks=2, diagonal_A="1", targets=("0", "1")))
    assert sum(p.numel() for p in adapters.parameters()) == 4 * (6 + 4 // 2) + 4 * (4 // 2 + 6)


def test_what_does_not_make_blocks_is_refused():
    with pytest.raises(ConfigError, match="rank is 4; it must be a multiple of blocks, 3"):
        BDLoRA(rank=4, blocks=3)
    with pytest.raises(TargetError, match="5 output channels do not make 2 blocks"):
        attach(nn.Sequential(nn.Linear(6, 5)), BDLoRA(rank=4, blocks=2, targets="0"))


BOTH = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("make", "config", "bd"),
    [
        (llama, {"target_modules": ["q_proj", "o_proj", "down_proj", "up_proj"]}, {**BOTH, "nblocks": 4}),
        (llama, {"target_modules": ["q_proj", "o_proj", "v_proj"]}, {**BOTH, "nblocks": 2, "match_strict": False}),
        (llama, {"target_modules": ["q_proj", "o_proj"]}, BOTH),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, bd):
    from_peft(make, peft.LoraConfig(r=8, use_bdlora=peft.tuners.lora.config.BdLoraConfig(**bd), **config))


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, BDLoRA(rank=8, blocks=4))


def test_where_hf_peft_has_none_the_folder_says_so(tmp_path):
    adapters = attach(gpt2(), BDLoRA(rank=8, blocks=4), seed=0)
    adapters.save(tmp_path / "a")
    assert "no BD-LoRA for transposed layers" in (tmp_path / "a" / "smidgen.json").read_text()


def test_hf_peft_reads_ours_where_some_layers_are_plain():
    to_peft_and_back(llama, BDLoRA(rank=4, blocks=2, diagonal_A="*.1.*.o_proj", diagonal_B="q_proj"))
