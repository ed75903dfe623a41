"""OFT against its equation, written out in float64, and against Hugging Face PEFT 0.21.2."""

from functools import partial

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError
from smidgen.methods.oft import OFT

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import Net, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Image(nn.Module):
    """A 1 x 1 convolution with a stride, and one of 3 x 3; input (B, 6, 5, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(6, 4, 1, stride=2, padding=1)
        self.patch = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.patch(self.point(x))


def seeded(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def skew(numbers: list[float], size: int) -> Tensor:
    Q, numbers = torch.zeros(size, size, dtype=torch.float64), list(numbers)
    for row in range(size):
        for column in range(row + 1, size):
            Q[row, column] = numbers.pop(0)
            Q[column, row] = -Q[row, column]
    return Q


@pytest.mark.parametrize("exact", [True, False])
def test_the_output_is_that_of_the_weight_turned_block_by_block(exact: bool):
    layer, x, eye = nn.Linear(6, 5).double(), torch.randn(4, 6).double(), torch.eye(3, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), OFT(block_size=3, cayley_neumann=not exact, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.Q, std=0.2)
    R = torch.zeros(6, 6, dtype=torch.float64)
    for block in range(2):
        Q = skew(part.Q[block].tolist(), 3)
        series = eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
        R[3 * block : 3 * block + 3, 3 * block : 3 * block + 3] = (
            (eye - Q) @ torch.linalg.inv(eye + Q) if exact else series
        )
    expected = x @ (layer.weight @ R.T).T + layer.bias
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-12)
    gap = (R @ R.T - torch.eye(6)).abs().max()
    assert gap < (1e-14 if exact else 0.1)


def test_gradients_are_those_of_the_turned_weight():
    layer, x = nn.Linear(6, 5).double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    for shared in (False, True):
        adapters = attach(nn.Sequential(layer), OFT(block_size=2, block_share=shared, targets="0"), seed=0)
        part = adapters.parts("default")["0"]
        nn.init.normal_(part.Q, std=0.2)
        out = adapters.model(x).square().sum()
        W, b = part.merged(layer.weight.detach(), layer.bias.detach(), slice(None))
        expected = nn.functional.linear(x, W, b).square().sum()
        ours, theirs = (torch.autograd.grad(value, (part.Q, x)) for value in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        adapters.detach()


def test_a_constrained_block_stays_within_eps():
    adapters = attach(nn.Sequential(nn.Linear(6, 5)), OFT(block_size=3, coft=True, eps=0.01, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.Q)
    turned = part.turned(torch.eye(6)) - torch.eye(6)
    assert 0 < torch.linalg.matrix_norm(turned[:3, :3]) <= 2.001 * 0.01 / 2**0.5  # R - I is 2 Q and less


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"block_size": 4}, 12 // 4 * 6 + 8 // 4 * 6),
        ({"block_size": 5}, 12 // 4 * 6 + 8 // 4 * 6),  # the divisor next to it, the smaller of two
        ({"blocks": 2}, 2 * 15 + 2 * 6),
        ({"block_size": 4, "block_share": True}, 6 + 6),
    ],
)
def test_it_trains_the_numbers_above_the_diagonals(settings, count: int):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    adapters = attach(model, OFT(**settings, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == count


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        OFT(block_size=0)
    with pytest.raises(ConfigError, match="fewer than 4"):
        OFT(terms=2)


LLAMA = [
    {"oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]},
    {"oft_block_size": 0, "r": 4, "target_modules": "all-linear", "module_dropout": 0.5},
    {"oft_block_size": 5, "target_modules": "all-linear", "block_share": True, "use_cayley_neumann": False},
    {"oft_block_size": 8, "target_modules": "all-linear", "coft": True, "eps": 0.5, "num_cayley_neumann_terms": 3},
    {"oft_block_size": 8, "target_modules": ["q_proj"], "num_cayley_neumann_terms": 7},
    {"oft_block_size": 4, "target_modules": ["embed_tokens"]},
]


@pytest.mark.parametrize("config", LLAMA, ids=str)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.OFTConfig(**config))


def test_a_folder_on_a_1x1_convolution_is_read_and_written():
    make, run = partial(seeded, Image), run_on(torch.randn(2, 6, 5, 5))
    from_peft(make, peft.OFTConfig(oft_block_size=3, target_modules=["point"]), run=run)
    to_peft_and_back(make, OFT(block_size=3, targets="point"), run=run)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (OFT(block_size=8), {"oft_block_size": 8, "r": 0}),
        (OFT(blocks=2, block_share=True, cayley_neumann=False), {"oft_block_size": 0, "r": 2}),
        (OFT(block_size=4, terms=6, targets=["embed_tokens", "*.up_proj"]), {"num_cayley_neumann_terms": 6}),
    ],
)
def test_hf_peft_reads_ours(method: OFT, says):
    to_peft_and_back(llama, method, says=says)


def test_a_folder_that_turned_overlapping_patches_is_refused(tmp_path):
    theirs = peft.get_peft_model(Image(), peft.OFTConfig(oft_block_size=4, target_modules=["patch"]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match=r"patch: HF PEFT.s OFT turns overlapping patches"):
        load(Image(), tmp_path)


def test_other_layers_are_kept_in_our_own_layout(tmp_path):
    model, ids = seeded(Net), torch.randint(10, (2, 5))
    adapters = attach(model, OFT(block_size=2, targets=["words", "conv", "image", "grouped", "up"]), seed=0)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapters.save(tmp_path)
    other = seeded(Net)
    load(other, tmp_path)
    assert torch.equal(other(ids), model(ids))
