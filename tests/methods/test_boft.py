"""BOFT against its permutations and blocks, written out in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import peft.tuners.boft.layer
import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.boft import BOFT

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Image(nn.Module):
    """Two square convolutions; input (B, 4, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.last = nn.Conv2d(6, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def image() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Image()


class Extension:
    """What HF PEFT's CUDA extension computes, so that it trains more than one factor."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture
def with_extension(monkeypatch):
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: Extension)


def test_the_output_is_that_of_the_weight_turned_by_all_factors():
    D, B, M = 8, 2, 3
    layer, x, eye = nn.Linear(D, 5).double(), torch.randn(4, D).double(), torch.eye(B, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), BOFT(block_size=B, factors=M, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.q, std=0.5)
    nn.init.normal_(part.s)
    R = torch.eye(D, dtype=torch.float64)
    for m in range(M):
        blocks = []
        for q in part.q[m].detach():
            Q = (q - q.T) / 2
            blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
        P = torch.zeros(D, D, dtype=torch.float64)
        reach = B * 2**m  # of one group: its even half-blocks come first, then its odd ones
        for row in range(D):
            group, place = divmod(row, reach)
            half, within = divmod(place, B // 2)
            count = 2**m
            source = 2 * half if half < count else 2 * (half - count) + 1
            P[row, group * reach + source * (B // 2) + within] = 1
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    expected = (x @ (layer.weight @ R.T).T) * part.s.T + layer.bias
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-12)


def test_it_trains_its_blocks_and_a_scale_per_output():
    adapters = attach(nn.Sequential(nn.Linear(12, 7)), BOFT(block_size=2, factors=2, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 12 * 2 + 7


def test_dropout_leaves_out_a_share_of_one_factors_blocks():
    layer = nn.Linear(16, 16)
    adapters = attach(nn.Sequential(layer), BOFT(block_size=2, factors=2, dropout=0.5, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    kept = part._kept(2, 8)
    assert sorted(kept.sum((1, 2, 3)).tolist()) == [4, 8]
    nn.init.normal_(part.q)
    x = torch.randn(2, 16)
    adapters.model.train()
    assert not torch.equal(adapters.model(x), adapters.model(x))
    adapters.model.eval()
    assert torch.equal(adapters.model(x), adapters.model(x))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        BOFT(block_size=1)
    with pytest.raises(TargetError, match="do not divide into blocks of 4"):
        attach(nn.Sequential(nn.Linear(6, 5)), BOFT(targets="0"))
    with pytest.raises(TargetError, match="3 butterfly factors"):
        attach(nn.Sequential(nn.Linear(12, 5)), BOFT(block_size=2, factors=3, targets="0"))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"boft_block_size": 0, "boft_block_num": 4, "boft_dropout": 0.1, "target_modules": "all-linear"},
        {"boft_n_butterfly_factor": 2, "target_modules": ["q_proj"]},  # of which HF PEFT makes 1 here
    ],
    ids=str,
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.BOFTConfig(**config))


def test_a_folder_with_several_factors_is_read(with_extension):
    adapters = from_peft(llama, peft.BOFTConfig(boft_n_butterfly_factor=3, target_modules=["q_proj", "down_proj"]))
    assert {part.q.shape[0] for part in adapters.parts("default").values()} == {3}


def test_a_folder_on_a_square_convolution_is_read_and_written():
    run = run_on(torch.randn(2, 4, 7, 7))
    from_peft(image, peft.BOFTConfig(boft_block_size=3, target_modules=["first", "last"]), run=run)
    to_peft_and_back(image, BOFT(block_size=3, targets=["first", "last"]), run=run)


def test_hf_peft_reads_ours(with_extension):
    to_peft_and_back(llama, BOFT(block_size=8), says={"boft_block_size": 8, "boft_block_num": 0})
    to_peft_and_back(llama, BOFT(blocks=4, factors=2), says={"boft_block_size": 0, "boft_n_butterfly_factor": 2})
