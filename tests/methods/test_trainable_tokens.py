"""Trainable tokens against replacing rows by hand in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach, load
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.trainable_tokens import TrainableTokens

from ..formats.both_ways import from_peft, gap, run_on, run_text, to_peft_and_back
from ..formats.models import Net, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def net() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("tokens", [(3,), (8, 2, 5)])
def test_the_named_rows_are_replaced_and_no_others(tokens: tuple[int, ...]):
    layer, x = nn.Embedding(9, 4).double(), torch.arange(9)[None]
    expected = layer(x).detach()
    expected[0, list(tokens)] = 7.0
    adapters = attach(nn.Sequential(layer), TrainableTokens(tokens=tokens))
    nn.init.constant_(adapters.parameters()[0], 7.0)
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-14)


def test_a_row_of_a_biased_linear_layer_keeps_its_bias():
    layer, x = nn.Linear(4, 6).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    W = layer.weight.detach().clone()
    W[[5, 1]] = torch.randn(2, 4, dtype=torch.float64)
    expected = x @ W.T + layer.bias
    adapters = attach(nn.Sequential(layer), TrainableTokens(targets="0", tokens=(5, 1)))
    with torch.no_grad():
        adapters.parameters()[0].copy_(W[[5, 1]])
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-14)


def test_it_trains_n_rows_of_width_D_once_also_where_the_head_is_tied():
    for make in (llama, tied_llama):
        assert sum(p.numel() for p in attach(make(), TrainableTokens(tokens=(1, 2, 3))).parameters()) == 3 * 32


def test_a_tied_head_follows():
    model = tied_llama()
    adapters = attach(model, TrainableTokens(tokens=(90, 4)))
    assert [site.name for site in adapters.sites("default")] == ["model.embed_tokens", "lm_head"]
    rows = adapters.parameters()[0]
    with torch.no_grad():
        rows.mul_(2)
    other = tied_llama()
    with torch.no_grad():
        other.lm_head.weight[[90, 4]] = rows
    ids = torch.tensor([[4, 90, 7]])
    assert gap(model(input_ids=ids).logits, other(input_ids=ids).logits) < 1e-6


def test_a_folder_holds_whole_rows_so_that_newly_drawn_ones_do_not_matter(tmp_path):
    model = llama()
    adapters = attach(model, TrainableTokens(tokens=(99, 1)))
    with torch.no_grad():
        adapters.parameters()[0].add_(1)
    expected = run_text(model)
    adapters.save(tmp_path / "new")
    other = llama()
    nn.init.normal_(other.model.embed_tokens.weight.data[[99, 1]])
    with torch.no_grad():
        other.model.embed_tokens.weight[[99, 1]] = 3.0
    load(other, tmp_path / "new", check_base=False)
    assert gap(run_text(other), expected) < 1e-6


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"token_indices": [7, 2, 50], "target_modules": ["embed_tokens"]}),
        (llama, {"token_indices": [7, 2, 50]}),
        (llama, {"token_indices": [7, 2], "target_modules": ["embed_tokens", "lm_head"]}),
        (tied_llama, {"token_indices": [7, 2, 50]}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.TrainableTokensConfig(**config))


@pytest.mark.parametrize("make", [llama, tied_llama])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, TrainableTokens(tokens=(9, 3, 4)), says={"token_indices": [9, 3, 4]})


def test_hf_peft_reads_ours_of_a_plain_embedding():
    method = TrainableTokens(targets="words", tokens=(1, 4))
    to_peft_and_back(net, method, run=run_on(torch.arange(5)[None]), says={"target_modules": ["words"]})


def test_a_biased_layer_is_not_given_to_hf_peft_which_would_drop_the_bias(tmp_path):
    adapters = attach(net(), TrainableTokens(targets="up", tokens=(1,)))
    adapters.save(tmp_path / "up")
    assert "leaves the bias" in (tmp_path / "up" / "smidgen.json").read_text()


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="tokens names \\[3\\] more than once"):
        TrainableTokens(tokens=(3, 1, 3))
    with pytest.raises(ConfigError, match="whole number"):
        TrainableTokens(tokens=(-1,))
    with pytest.raises(TargetError, match="no token is named"):
        attach(llama(), TrainableTokens())
    with pytest.raises(TargetError, match="rows 0 to 99, and tokens names \\[100\\]"):
        attach(llama(), TrainableTokens(tokens=(5, 100)))
    with pytest.raises(TargetError, match="0 embeddings"):
        attach(nn.Sequential(nn.Linear(2, 2)), TrainableTokens(tokens=(1,)))
    with pytest.raises(TargetError, match="max_norm"):
        attach(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), TrainableTokens(tokens=(1,)))
