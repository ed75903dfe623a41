"""HRA against its chain of reflections, walked in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import Targets, attach, load
from smidgen.core.errors import FolderError, TargetError
from smidgen.methods.hra import HRA

from ..formats.both_ways import from_peft, gap, run_on, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


class Image(nn.Module):
    """A square convolution, and one that is dilated; input (B, 3, 9, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(4, 2, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dilated(self.square(x))


def image() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Image()


def chain(U: Tensor) -> Tensor:
    H = torch.eye(len(U), dtype=U.dtype)
    for u in U.T:
        H = H @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u) / u.square().sum())
    return H


def gram_schmidt(U: Tensor) -> Tensor:
    found: list[Tensor] = []
    for u in U.T:
        for q in found:
            u = u - (q @ u) * q
        found.append(u / u.norm())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("orthogonalise", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_the_output_is_that_of_the_weight_after_all_reflections(rank: int, orthogonalise: bool):
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6).double()
    adapters = attach(nn.Sequential(layer), HRA(rank=rank, orthogonalise=orthogonalise, targets="0"), seed=0)
    U = adapters.parts("default")["0"].U
    nn.init.normal_(U)
    H = chain(gram_schmidt(U.detach()) if orthogonalise else U.detach())
    torch.testing.assert_close(adapters.model(x), x @ (layer.weight @ H).T + layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_even_rank_starts_from_the_base_model_up_to_rounding(dtype: torch.dtype):
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)).to(dtype), torch.randn(4, 32, dtype=dtype)
    before = model(x)
    attach(model, HRA(rank=8, targets=Targets.of_type(nn.Linear)), seed=0)
    assert gap(model(x), before) < 20 * torch.finfo(dtype).eps


def test_it_trains_rank_vectors_of_the_fan_in():
    adapters = attach(nn.Sequential(nn.Linear(12, 8), nn.Conv2d(3, 4, 3)), HRA(rank=4, targets=["0", "1"]))
    assert sum(p.numel() for p in adapters.parameters()) == 4 * 12 + 4 * 3 * 3 * 3


def test_more_orthogonal_vectors_than_channels_are_refused():
    with pytest.raises(TargetError, match="no 4 directions"):
        attach(nn.Sequential(nn.Linear(3, 5)), HRA(rank=4, orthogonalise=True, targets="0"))


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "target_modules": ["q_proj"]},
        {"r": 4, "target_modules": "all-linear", "apply_GS": True, "init_weights": False},
    ],
    ids=str,
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.HRAConfig(**config))


def test_a_folder_on_a_square_convolution_is_read_and_written():
    run = run_on(torch.randn(2, 3, 9, 9))
    from_peft(image, peft.HRAConfig(r=2, target_modules=["square"]), run=run)
    to_peft_and_back(image, HRA(rank=2, targets="square"), run=run)


def test_a_folder_on_a_dilated_convolution_is_refused(tmp_path):
    theirs = peft.get_peft_model(image(), peft.HRAConfig(r=2, target_modules=["dilated"]))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match=r"dilated: HF PEFT takes it for a square convolution"):
        load(image(), tmp_path)


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_hf_peft_reads_ours(orthogonalise: bool):
    method = HRA(rank=4, orthogonalise=orthogonalise)
    to_peft_and_back(llama, method, says={"r": 4, "apply_GS": orthogonalise})
