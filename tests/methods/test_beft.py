"""BEFT against its equation, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import NotMergeable, TargetError
from smidgen.methods.beft import BEFT

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama
from ..laws.bodies import bert

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_vector_is_added_to_what_the_layer_gives(has_bias: bool):
    model, x = nn.Sequential(nn.Linear(3, 5, bias=has_bias).double()), torch.randn(2, 3, dtype=torch.float64)
    expected = model(x) + torch.arange(5)
    adapters = attach(model, BEFT(targets="0"))
    adapters.parts("default")["0"].change.data.copy_(torch.arange(5))
    assert torch.equal(model(x), expected)
    if has_bias:
        adapters.merge()
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-14)
    else:
        with pytest.raises(NotMergeable, match="Keep it attached"):
            adapters.merge()


def test_by_itself_it_takes_the_value_projections():
    assert [site.path for site in BEFT().resolve(bert()).sites] == ["bert.encoder.layer.0.attention.self.value"]
    adapters = attach(llama(), BEFT())
    assert [site.path for site in adapters.sites("default")] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 16


def test_a_model_without_attention_is_refused():
    with pytest.raises(TargetError, match="value projection"):
        attach(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), BEFT())


@pytest.mark.parametrize("settings", [{"attention_bias": False}, {"attention_bias": True}])
def test_folders_of_hf_peft_are_read(settings):
    from_peft(lambda: llama(**settings), peft.BeftConfig(target_modules=["v_proj"]))


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, BEFT())
