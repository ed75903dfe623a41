"""LayerNorm tuning against torch's own norms, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import TargetError
from smidgen.methods.ln_tuning import LNTuning

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama
from ..laws.bodies import bert

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def test_the_norm_runs_with_the_adapters_own_weight_and_bias_and_keeps_its_own():
    norm, x = nn.LayerNorm(4).double(), torch.randn(3, 4, dtype=torch.float64)
    model, before = nn.Sequential(norm), norm.weight.detach().clone()
    adapters = attach(model, LNTuning(targets="0"))
    parts = adapters.parts("default")
    assert list(parts) == ["0.weight", "0.bias"]
    for part in parts.values():
        nn.init.normal_(part.value)
    expected = nn.functional.layer_norm(x, (4,), parts["0.weight"].value, parts["0.bias"].value)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    assert torch.equal(norm.weight, before)


def test_by_itself_it_takes_all_norms_of_the_body():
    names = {site.name for site in LNTuning().resolve(llama()).sites}
    layers = {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")}
    assert names == {*layers, "model.norm.weight"}
    adapters = attach(bert(), LNTuning())
    assert sum(p.numel() for p in adapters.parameters()) == 3 * 2 * 8  # of embeddings, attention and feed-forward


def test_what_is_no_norm_is_refused_with_the_reason():
    with pytest.raises(TargetError, match="Linear is no norm"):
        attach(nn.Sequential(nn.Linear(3, 4)), LNTuning(targets="0"))
    with pytest.raises(TargetError, match="batchnorm_tuning"):
        attach(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)), LNTuning())


def test_one_parameter_alone_can_be_named():
    adapters = attach(nn.Sequential(nn.LayerNorm(4)), LNTuning(targets=Targets("0").parameter("bias")))
    assert list(adapters.parts("default")) == ["0.bias"]


@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["input_layernorm", "norm"]), (gpt2, ["ln_1", "ln_2", "ln_f"]), (gpt2, ["ln_f"])]
)
def test_folders_of_hf_peft_are_read(make, targets):
    from_peft(make, peft.LNTuningConfig(target_modules=targets))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, LNTuning())


def test_what_hf_peft_cannot_hold_is_written_in_our_layout(tmp_path):
    for number, (layer, method, reason) in enumerate(
        [
            (nn.LayerNorm(4), LNTuning(targets=Targets("0").parameter("bias")), "a norm whole"),
            (nn.BatchNorm1d(4), LNTuning(targets="0"), "running statistics"),
        ]
    ):
        attach(nn.Sequential(layer), method).save(tmp_path / str(number))
        assert reason in (tmp_path / str(number) / "smidgen.json").read_text()
