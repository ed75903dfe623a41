"""WaveFT against Haar's transform by hand, and against Hugging Face PEFT 0.21.2."""

import math

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import ConfigError, FolderError
from smidgen.core.wavelets import FAMILIES, filters
from smidgen.methods.waveft import WaveFT

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_with_haars_wavelet_a_coefficient_of_a_band_is_a_square_of_four_signs():
    O, I = 6, 4
    adapters = attach(nn.Sequential(nn.Linear(I, O).double()), WaveFT(frequencies=O * I, scale=3.0, targets="0"))
    part = adapters.parts("default")["0"]
    # upper left: mean; upper right: the first index is the difference; lower left: the second is; lower right: both
    signs = {(0, 0): (1, 1, 1, 1), (0, 1): (1, 1, -1, -1), (1, 0): (1, -1, 1, -1), (1, 1): (1, -1, -1, 1)}
    for o in range(O):
        for i in range(I):
            with torch.no_grad():
                part.spectrum.copy_(part.places == o * I + i)
            band, (k, l) = signs[o >= 3, i >= 2], (o % 3, i % 2)
            expected = torch.zeros(O, I, dtype=torch.float64)
            expected[2 * k : 2 * k + 2, 2 * l : 2 * l + 2] = torch.tensor(band).view(2, 2) / 2
            torch.testing.assert_close(part.weight_delta(slice(None)), 3.0 * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_filter_is_one_of_an_orthogonal_wavelet(family: str):
    h, g = filters(family)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-10)
    for k in range(len(h) // 2):
        even, odd = h[: len(h) - 2 * k], g[: len(g) - 2 * k]
        assert even.dot(h[2 * k :]).item() == pytest.approx(float(k == 0), abs=1e-10)
        assert odd.dot(g[2 * k :]).item() == pytest.approx(float(k == 0), abs=1e-10)
        assert odd.dot(h[2 * k :]).item() == pytest.approx(0, abs=1e-10)


def test_without_the_transform_the_coefficients_are_entries_of_the_change():
    part = attach(nn.Sequential(nn.Linear(4, 5)), WaveFT(frequencies=3, scale=2.0, use_idwt=False, targets="0")).parts(
        "default"
    )["0"]
    nn.init.normal_(part.spectrum)
    assert torch.equal(part.weight_delta(slice(None)).flatten()[part.places], 2.0 * part.spectrum)


def test_it_trains_n_numbers_per_site_or_as_the_share_of_its_weight():
    def counts(**settings):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 12), nn.Linear(12, 2))  # 24, 72 and 24 weights
        adapters = attach(model, WaveFT(frequencies=10, targets=Targets.of_type(nn.Linear), **settings))
        return [p.numel() for p in adapters.parameters()]

    assert counts() == [10, 10, 10]
    assert counts(proportional=True) == [6, 18, 6]


def test_an_unknown_wavelet_is_refused():
    with pytest.raises(ConfigError, match='no wavelet "db99"'):
        WaveFT(wavelet="db99")


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"n_frequency": 20, "target_modules": ["q_proj", "v_proj"]}),
        (llama, {"n_frequency": 30, "target_modules": "all-linear", "wavelet_family": "sym4", "random_loc_seed": 3}),
        (llama, {"n_frequency": 30, "target_modules": ["k_proj"], "wavelet_family": "coif2", "scaling": 3.0}),
        (llama, {"n_frequency": 30, "target_modules": ["k_proj"], "use_idwt": False}),
        (llama, {"n_frequency": 30, "target_modules": ["q_proj", "v_proj"], "proportional_parameters": True}),
        (llama, {"n_frequency": 9, "target_modules": ["k_proj"], "n_frequency_pattern": {"1.self_attn.k_proj": 4}}),
        (gpt2, {"n_frequency": 20, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)  # fmt: skip
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.WaveFTConfig(**config))


@pytest.mark.parametrize("family", ["db1", "db2", "db10", "sym3", "coif3"])
def test_odd_sizes_are_padded_as_hf_peft_pads_them(family: str):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 5))

    config = peft.WaveFTConfig(n_frequency=30, target_modules=["0", "1"], wavelet_family=family)
    from_peft(make, config, run=run_on(torch.randn(3, 7, generator=torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    method = WaveFT(frequencies=30, seed=3, wavelet="db4", frequencies_pattern={"*.0.*": 10})
    to_peft_and_back(make, method, says={"n_frequency": 30, "wavelet_family": "db4"})


def test_hf_pefts_coif4_is_no_wavelet_and_refused(tmp_path):
    config = peft.WaveFTConfig(n_frequency=9, target_modules=["q_proj"], wavelet_family="coif4")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(FolderError, match="not an orthogonal wavelet"):
        load(llama(), tmp_path)
