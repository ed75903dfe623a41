"""FourierFT against its equation, summed naively in float64, and against Hugging Face PEFT 0.21.2."""

import math

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.methods.fourierft import FourierFT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_the_change_is_the_papers_sum_of_cosines():
    O, I, n = 5, 4, 6
    adapters = attach(nn.Sequential(nn.Linear(I, O).double()), FourierFT(frequencies=n, scale=2.5, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    torch.nn.init.normal_(part.spectrum)
    p, q = (part.places // I).tolist(), (part.places % I).tolist()
    expected = torch.zeros(O, I, dtype=torch.float64)
    for k in range(n):  # equation 3: the real part of c exp(i 2 pi (p o / O + q i / I)), over O I
        for o in range(O):
            for i in range(I):
                angle = 2 * math.pi * (p[k] * o / O + q[k] * i / I)
                expected[o, i] += part.spectrum[k].item() * math.cos(angle) / (O * I)
    torch.testing.assert_close(part.weight_delta(slice(None)), 2.5 * expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 7])
def test_it_trains_n_numbers_per_site(n: int):
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    adapters = attach(model, FourierFT(frequencies=n, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * n


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"n_frequency": 20, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"n_frequency": 9, "target_modules": "all-linear", "random_loc_seed": 5, "scaling": 30.0}),
        (
            llama,
            {"n_frequency": 9, "target_modules": ["q_proj"], "n_frequency_pattern": {"layers.1.self_attn.q_proj": 4}},
        ),
        (gpt2, {"n_frequency": 20, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.FourierFTConfig(**config))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    method = FourierFT(frequencies=30, seed=3, frequencies_pattern={"*.0.*": 10})
    to_peft_and_back(make, method, says={"n_frequency": 30, "random_loc_seed": 3})
