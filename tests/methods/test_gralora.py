"""GraLoRA against its equation, block by block in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import Tensor, nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.gralora import GraLoRA

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("hybrid", [0, 2])
@pytest.mark.parametrize("convolution", [False, True])
def test_every_block_has_a_low_rank_change_of_its_own(hybrid: int, convolution: bool):
    k, R, I, O = 3, 6, 12, 9
    layer = (nn.Conv1d(4, O, 3) if convolution else nn.Linear(I, O)).double()
    x = torch.randn(2, 4, 8) if convolution else torch.randn(2, 5, I)
    method = GraLoRA(rank=R, blocks=k, alpha=5.0, hybrid_rank=hybrid, targets="0")
    adapters = attach(nn.Sequential(layer), method, seed=0)
    part = adapters.parts("default")["0"]
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    W = torch.zeros(O, I, dtype=torch.float64)
    for j in range(k):
        for n in range(k):
            A = part.A[n, :, 2 * j : 2 * j + 2].T  # (R/k, I/k)
            B = part.B[j, 2 * n : 2 * n + 2].T  # (O/k, R/k)
            W[3 * j : 3 * j + 3, 4 * n : 4 * n + 4] = B @ A
    if hybrid:
        W += part.general_B @ part.general_A
    adapters.activate(None)
    changed = layer.weight + 5.0 / (R + hybrid) * W.view(layer.weight.shape)
    expected: Tensor = torch.func.functional_call(layer, {"weight": changed}, x.double())
    adapters.activate("default")
    torch.testing.assert_close(adapters.model(x.double()), expected, rtol=0, atol=1e-12)


def test_it_trains_as_much_as_lora():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    adapters = attach(model, GraLoRA(rank=4, hybrid_rank=3, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == (4 + 3) * (12 + 8 + 8 + 4)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiple of 4"):
        GraLoRA(rank=6, blocks=4)
    with pytest.raises(TargetError, match="5 x 4 weight does not divide into 2 x 2"):
        attach(nn.Sequential(nn.Linear(4, 5)), GraLoRA(targets="0"))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"r": 4, "target_modules": ["q_proj", "v_proj"], "gralora_dropout": 0.1}),
        (llama, {"r": 8, "gralora_k": 4, "hybrid_r": 3, "alpha": 7, "target_modules": "all-linear"}),
        (gpt2, {"r": 4, "hybrid_r": 1, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.GraloraConfig(**config))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, GraLoRA(rank=4, alpha=6.0), says={"r": 4, "gralora_k": 2})
    to_peft_and_back(make, GraLoRA(rank=8, blocks=4, hybrid_rank=2), says={"hybrid_r": 2})
