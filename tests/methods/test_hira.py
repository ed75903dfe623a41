"""HiRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import Targets, attach, load
from smidgen.core.errors import FolderError
from smidgen.methods.hira import HiRA

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Net(nn.Module):
    """An embedding and convolutions of every dimension; input (B, 5) of word numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=2, dilation=2)
        self.image = nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0))
        self.solid = nn.Conv3d(4, 5, (2, 1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.image(self.line(self.words(ids).transpose(1, 2))[..., None])
        return self.solid(h[..., None])


def net() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Net()


IDS = torch.arange(10).view(2, 5)


def test_the_weight_is_multiplied_entry_by_entry():
    layer = nn.Linear(3, 5).double()
    model, x = nn.Sequential(layer), torch.randn(4, 3, dtype=torch.float64)
    part = attach(model, HiRA(rank=2, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.B)
    expected = torch.empty(5, 3, dtype=torch.float64)
    for o in range(5):
        for i in range(3):
            expected[o, i] = layer.weight[o, i] * (1 + sum(part.B[o, r] * part.A[r, i] for r in range(2)))
    torch.testing.assert_close(model(x), F.linear(x, expected, layer.bias), rtol=0, atol=1e-13)


def test_it_trains_as_many_numbers_as_lora_and_changes_with_a_higher_rank():
    adapters = attach(nn.Sequential(nn.Linear(9, 11)), HiRA(rank=2, targets="0"), seed=0)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (9 + 11)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.B)
    assert torch.linalg.matrix_rank(part.weight_delta(slice(None))) == 9


def test_dropout_acts_on_the_input_of_the_change_alone():
    layer = nn.Linear(3, 5).double()
    model, x = nn.Sequential(layer), torch.randn(4, 3, dtype=torch.float64)
    base = layer(x).detach()
    part = attach(model, HiRA(rank=2, dropout=0.5, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.B)
    torch.default_generator.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.default_generator.manual_seed(1)
    expected = base + F.linear(dropped, part.weight_delta(slice(None)))
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"r": 4, "target_modules": "all-linear", "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),  # unused
        (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "hira_dropout": 0.1}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.HiraConfig(**config))


@pytest.mark.parametrize("names", [["words"], ["line"], ["image"], ["solid"], ["words", "line", "image"]])
def test_folders_of_hf_peft_are_read_on_embeddings_and_convolutions(names):
    from_peft(net, peft.HiraConfig(r=3, target_modules=names), run=run_on(IDS))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, HiRA(rank=4), says={"r": 4})


def test_hf_peft_reads_ours_on_embeddings_and_convolutions():
    to_peft_and_back(net, HiRA(rank=3, targets=Targets("words", "line", "image", "solid")), run=run_on(IDS))


@pytest.mark.parametrize(
    ("layer", "method", "reason"),
    [
        (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), HiRA(targets="0"), "pads with zeros"),
        (nn.Conv1d(4, 4, 3, groups=2), HiRA(targets="0"), "grouped"),
        (nn.Conv3d(3, 4, 1), HiRA(targets="0"), "1 x 1"),
        (nn.Linear(3, 4), HiRA(targets="0", rank_pattern={"0": 2}), "the same rank"),
    ],
)
def test_what_hf_peft_would_get_wrong_is_written_in_our_own_layout_with_the_reason(tmp_path, layer, method, reason):
    base = copy.deepcopy(layer)
    attach(nn.Sequential(layer), method).save(tmp_path / "folder")
    assert reason in json.loads((tmp_path / "folder" / "smidgen.json").read_text())["not_peft"]
    load(nn.Sequential(base), tmp_path / "folder")


def test_what_hf_peft_trained_with_other_padding_is_refused():
    def circular() -> nn.Module:
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"))

    with pytest.raises(FolderError, match="pads with zeros"):
        from_peft(circular, peft.HiraConfig(r=2, target_modules=["0"]), run=run_on(torch.randn(2, 3, 5)))
