"""GLoRA against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import copy
import itertools

import peft
import pytest
import torch
from torch import nn

from smidgen import Stack, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.glora import FORMS, GLoRA

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import Attention, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
ALL = [{"A_B": a, "C": c, "D_E": d} for a, c, d in itertools.product(*FORMS.values()) if (a, c, d) != ("none",) * 3]
RUN = run_on(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))


def two_layers() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Attention().eval()


@torch.no_grad()
@pytest.mark.parametrize("forms", ALL, ids=lambda forms: "-".join(forms.values()))
def test_weight_and_bias_are_scaled_and_shifted(forms):
    O, I, R = 5, 4, 3
    layer, x = nn.Linear(I, O).double(), torch.randn(2, 3, I, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), GLoRA(rank=R, targets="0", **forms), seed=0)
    for p in adapters.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    part = dict(adapters.parts("default")["0"].named_parameters())
    zero = torch.zeros(1, dtype=torch.float64)
    whole = {k: part[k] if k in part else part[f"{k}d"] @ part[f"{k}u"] if f"{k}d" in part else zero for k in "ABCDE"}
    W, b = layer.weight, layer.bias
    c = whole["C"].flatten() if whole["C"].numel() > 1 else torch.zeros(I, dtype=torch.float64)
    expected = x @ (W + W * whole["A"] + whole["B"]).T + b + b * whole["D"] + whole["E"] + W @ c
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-13)
    sizes = {"lora": 2 * R * (O + I), "vector": 2 * O, "constant": 2, "none": 0}[forms["A_B"]]
    sizes += {"lora": R * (I + 1), "vector": I, "none": 0}[forms["C"]]
    sizes += {"vector": 2 * O, "constant": 2, "none": 0}[forms["D_E"]]
    assert sum(p.numel() for p in part.values()) == sizes


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(4, 5), nn.Conv2d(4, 6, 3, groups=2, padding=1)])
@pytest.mark.parametrize("A_B", ["lora", "vector"])
def test_what_scales_the_bias_merges_too_also_in_a_stack(layer, A_B):
    # not in the laws, whose BERT has biases of zero, of which D learns nothing
    layer, x = copy.deepcopy(layer).double(), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), GLoRA(rank=2, targets="0", A_B=A_B, D_E="vector"), "a", seed=0)
    adapters.add(GLoRA(rank=2, targets="0", A_B=A_B, D_E="constant"), "b", seed=0)
    for p in adapters.parameters("a", "b"):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    adapters.activate(Stack("a", "b"))
    running = adapters.model(x)
    adapters.merge()
    torch.testing.assert_close(adapters.model(x), running, rtol=0, atol=1e-12)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match='D_E is "lora"; it is one of vector, constant, none'):
        GLoRA(D_E="lora")
    with pytest.raises(TargetError, match="nothing would be trained"):
        attach(nn.Sequential(nn.Linear(2, 3, bias=False)), GLoRA(A_B="none", targets="0"))


@pytest.mark.parametrize(
    ("make", "run", "forms"),
    [
        (llama, None, {"target_modules": ["q_proj", "v_proj"], "r": 4}),
        *((two_layers, RUN, {"target_modules": ["last"], **dict(zip(FORMS, f.values(), strict=True))}) for f in ALL),
    ],
)
def test_folders_of_hf_peft_are_read(make, run, forms):
    config = {{"A_B": "config_A_B", "C": "config_C", "D_E": "config_D_E"}.get(k, k): v for k, v in forms.items()}
    from_peft(make, peft.GloraConfig(**config), **({} if run is None else {"run": run}))


@pytest.mark.parametrize("forms", ALL, ids=lambda forms: "-".join(forms.values()))
def test_hf_peft_reads_ours(forms):
    to_peft_and_back(two_layers, GLoRA(targets="last", rank=2, **forms), run=RUN, says={"r": 2})


@pytest.mark.parametrize("form", FORMS["A_B"][:3])
def test_hf_peft_reads_ours_of_layers_without_bias(form):
    to_peft_and_back(llama, GLoRA(targets="*.q_proj", A_B=form))
