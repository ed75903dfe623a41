"""Lily against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import json

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import FolderError, NotMergeable
from smidgen.methods.lily import Lily

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Layers(nn.Module):
    """Five blocks with two linear layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 5), "down": nn.Linear(5, 3)}) for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = block["down"](block["up"](x))
        return x


def test_each_row_mixes_the_experts_by_what_its_own_tokens_ask_for():
    layer = nn.Linear(3, 5).double()
    model, x = nn.Sequential(layer), torch.randn(2, 4, 3, dtype=torch.float64)
    base = layer(x).detach()
    part = attach(model, Lily(rank=2, experts=3, scale=1.5, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.shared.B[0])
    A, B = part.shared.A[0], part.shared.B[0].view(3, 2, 5)
    for row in range(2):
        p = sum(torch.softmax(part.router @ (A @ token), 0) for token in x[row]) / 4
        mixed = p[0] * B[0] + p[1] * B[1] + p[2] * B[2]
        expected = base[row] + 1.5 * x[row] @ A.T @ mixed
        torch.testing.assert_close(model(x)[row], expected, rtol=0, atol=1e-13)


def test_a_is_shared_by_stride_layers_in_a_row_and_b_by_all_of_a_kind():
    method = Lily(rank=2, stride=2, experts=3, targets=Targets.of_type(nn.Linear))
    adapters = attach(Layers(), method)
    parts = adapters.parts("default")
    assert [parts[f"blocks.{i}.up"].which for i in range(5)] == [(0, 0), (0, 0), (2, 0), (2, 0), (4, 0)]
    assert [parts[f"blocks.{i}.down"].which for i in range(5)] == [(1, 1), (1, 1), (3, 1), (3, 1), (5, 1)]
    routers, A, B = 10 * 3 * 2, 3 * 2 * (3 + 5), 3 * 2 * (5 + 3)
    assert sum(p.numel() for p in adapters.parameters()) == routers + A + B


def test_what_is_added_depends_on_the_tokens_so_it_cannot_be_merged():
    adapters = attach(Layers(), Lily(rank=2, targets="*.up"))
    with pytest.raises(NotMergeable, match="Keep it attached"):
        adapters.merge()


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "stride_A": 2, "num_B": 3, "scaling": 0.5},
        {"r": 4, "target_modules": "all-linear", "stride_A": 2},
    ],
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.LilyConfig(**config))


def test_hf_peft_reads_ours():
    method = Lily(rank=4, stride=2, experts=3, scale=0.5)
    to_peft_and_back(llama, method, says={"r": 4, "stride_A": 2, "num_B": 3, "scaling": 0.5})


def test_layers_that_one_pattern_names_share_by_shape():
    config = peft.LilyConfig(r=4, target_modules=r".*(q_proj|o_proj|up_proj)")
    adapters = from_peft(llama, config)
    parts = adapters.parts("default")
    assert len({parts[name].which[1] for name in parts}) == 2


def test_names_of_which_one_is_the_end_of_another_are_refused():
    with pytest.raises(FolderError, match="target_modules"):
        from_peft(llama, peft.LilyConfig(r=4, target_modules=["q_proj", "layers.1.self_attn.q_proj"]))


def test_layers_that_only_a_list_of_paths_names_are_written_in_our_own_layout(tmp_path):
    adapters = attach(Layers(), Lily(rank=2, targets=Targets("blocks.1.up", "blocks.3.up")), seed=0)
    adapters.save(tmp_path / "folder")
    assert "other layers share" in json.loads((tmp_path / "folder" / "smidgen.json").read_text())["not_peft"]
    again = load(Layers(), tmp_path / "folder", check_base=False)
    for one, other in zip(again.parameters(), adapters.parameters(), strict=True):
        assert torch.equal(one, other)
