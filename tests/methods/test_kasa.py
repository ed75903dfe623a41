"""KaSA against its equations, and against Hugging Face PEFT 0.21.2, training and penalty included."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import TargetError
from smidgen.methods.kasa import KaSA

from ..formats.both_ways import from_peft, gap, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5))


def test_it_is_the_base_without_its_smallest_singular_values_plus_what_is_learned():
    layer, x = nn.Linear(4, 6).double(), torch.randn(3, 4, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    adapters = attach(nn.Sequential(layer), KaSA(rank=2, alpha=3.0, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    kept = (U[:, :2] * S[:2]) @ Vh[:2]
    torch.testing.assert_close(adapters.model(x), x @ kept.T + layer.bias, rtol=0, atol=1e-13)
    nn.init.normal_(part.B)
    W = kept + 1.5 * part.B @ torch.diag(part.d) @ part.A
    torch.testing.assert_close(adapters.model(x), x @ W.T + layer.bias, rtol=0, atol=1e-13)


def test_it_trains_a_number_per_rank_more_than_lora():
    adapters = attach(layers(), KaSA(rank=2, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (6 + 7 + 1)


def test_a_rank_that_leaves_nothing_is_refused():
    with pytest.raises(TargetError, match="has 5 singular values; KaSA leaves out 5"):
        attach(layers(), KaSA(rank=5, targets="1"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_gives_hf_pefts_outputs_penalty_and_gradients(dropout: float):
    config = peft.LoraConfig(
        target_modules=["0", "1"],
        r=2,
        lora_alpha=3,
        lora_dropout=dropout,
        kasa_config=peft.KasaConfig(beta=0.1, gamma=0.2),
    )
    theirs, ours = peft.get_peft_model(layers(), config).train(), layers()
    method = KaSA(rank=2, alpha=3, dropout=dropout, beta=0.1, gamma=0.2, targets=("0", "1"))
    adapters = attach(ours, method, seed=0)
    ours.train()
    pairs = []
    for path, part in adapters.parts("default").items():
        their = theirs.base_model.model.get_submodule(path)
        pairs += [(part.A, their.lora_A.default.weight), (part.B, their.lora_B.default.weight)]
        pairs += [(part.d, their.lora_diag["default"])]
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own.normal_())
    x, losses = torch.randn(8, 6), []
    penalties = (lambda: method.penalty(adapters.parts("default")), theirs.base_model._get_kasa_loss)
    for model, penalty in zip((ours, theirs), penalties, strict=True):
        torch.manual_seed(1)
        losses.append(model(x).square().mean() + penalty())
        losses[-1].backward()
    assert gap(losses[0], losses[1]) < 1e-6
    for own, their in pairs:
        assert gap(own.grad, their.grad) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 4},
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
)
def test_folders_of_hf_peft_are_read(config):
    adapters = from_peft(llama, peft.LoraConfig(kasa_config=peft.KasaConfig(beta=0.5), **config))
    assert adapters.method("default").beta == 0.5


def test_hf_peft_reads_ours():
    says = {"kasa_config": {"beta": 0.25, "gamma": 0.001}}
    to_peft_and_back(llama, KaSA(rank=3, alpha=5.0, beta=0.25, alpha_pattern={"*.v_proj": 2.0}), says=says)


def test_where_hf_peft_has_none_the_folder_says_so(tmp_path):
    adapters = attach(gpt2(), KaSA(rank=2), seed=0)
    adapters.save(tmp_path / "a")
    assert "no KaSA for transposed layers" in (tmp_path / "a" / "smidgen.json").read_text()
