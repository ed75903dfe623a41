"""C3A against its circulant blocks, written out in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import TargetError
from smidgen.methods.c3a import C3A

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("B", [1, 2, 3, 6])
def test_every_block_of_the_change_is_circulant(B: int):
    O, I = 6, 12
    layer, x = nn.Linear(I, O).double(), torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    adapters = attach(nn.Sequential(layer), C3A(block_size=B, targets="0"), seed=0)
    w = adapters.parts("default")["0"].w
    nn.init.normal_(w)
    W = layer.weight.detach().clone()
    for o in range(O):
        for i in range(I):
            W[o, i] += w[o // B, i // B, (i % B - o % B) % B].item() / I
    expected = x @ W.T + layer.bias
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (adapters.model(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_circulant_weight():
    layer, x = nn.Linear(8, 4).double(), torch.randn(3, 8).double()
    part = attach(nn.Sequential(layer), C3A(block_size=4, targets="0"), seed=0).parts("default")["0"]
    nn.init.normal_(part.w)
    one = (part.delta(x) ** 3).sum()
    other = (nn.functional.linear(x, part.weight_delta(slice(None))) ** 3).sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, part.w)[0] for value in (one, other)), rtol=0, atol=1e-12)


def test_it_trains_a_row_of_each_block():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    adapters = attach(model, C3A(block_size=4, block_size_pattern={"1": 2}, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == 12 * 8 // 4 + 8 * 4 // 2


def test_a_weight_that_does_not_divide_is_refused():
    with pytest.raises(TargetError, match="8 x 12 weight does not divide into blocks of 256"):
        attach(nn.Sequential(nn.Linear(12, 8)), C3A(targets="0"))


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": 8, "target_modules": ["q_proj", "v_proj"]},
        {"block_size": 16, "target_modules": "all-linear", "init_weights": "gaussian"},
        {"block_size": 8, "target_modules": ["q_proj"], "block_size_pattern": {"layers.1.self_attn.q_proj": 32}},
    ],
    ids=str,
)
def test_folders_of_hf_peft_are_read(config):
    def move(model: nn.Module) -> None:  # by more than noise: the change is divided by the fan-in
        for name, parameter in model.named_parameters():
            if "c3a_kernel" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))

    from_peft(llama, peft.C3AConfig(**config), change=move)


def test_hf_peft_reads_ours():
    method = C3A(block_size=4, block_size_pattern={"*.0.*.q_proj": 16}, targets=["*_proj"])
    to_peft_and_back(llama, method, says={"block_size": 4})
