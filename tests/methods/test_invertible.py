"""Invertible adapters: the couplings' equations, that the inverse undoes them, and where they go."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smidgen import AdapterSet, Weighted, attach
from smidgen.core.errors import AttachError, ConfigError, TargetError
from smidgen.methods.invertible import Couplings, Invertible

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 12, "vocab_size": 23}


def stir(adapters: AdapterSet) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator).to(parameter)


def couplings(adapters: AdapterSet) -> Couplings:
    return next(iter(adapters.parts("default").values())).shared  # type: ignore[return-value]


@pytest.mark.parametrize("coupling", ["nice", "glow"])
def test_it_is_the_papers_couplings_and_the_inverse_undoes_them(coupling: Any) -> None:
    layer = nn.Embedding(23, 7).double()
    adapters = attach(nn.Sequential(layer), Invertible(targets="0", coupling=coupling), seed=0)
    ids = torch.randint(23, (2, 5))
    adapters.activate(None)
    x = layer(ids)
    adapters.activate("default")
    assert torch.equal(layer(ids), x)
    stir(adapters)

    def inner(which: str, h: Tensor) -> Tensor:
        D, d, V, v = couplings(adapters).get_submodule(which).parameters()
        return torch.relu(h @ D.T + d) @ V.T + v

    x1, x2 = x[..., :3], x[..., 3:]
    if coupling == "nice":
        y1 = x1 + inner("first", x2)
        y2 = x2 + inner("last", y1)
    else:
        s, t = inner("first", x2).chunk(2, -1)
        y1 = torch.exp(5 * 0.636 * torch.atan(s / 5)) * x1 + t
        s, t = inner("last", y1).chunk(2, -1)
        y2 = torch.exp(5 * 0.636 * torch.atan(s / 5)) * x2 + t
    expected = torch.cat([y1, y2], -1)
    torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(couplings(adapters).inverse(expected), x, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, x, atol=0.1)


@pytest.mark.parametrize(("coupling", "times"), [("nice", 1), ("glow", 2)])
def test_it_trains_the_couplings_once(coupling: Any, times: int) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    adapters = attach(model, Invertible(coupling=coupling))
    I, O, W = 4, 4 * times, 2
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (W * (I + O) + W + O)


def test_it_goes_after_all_that_embeds_and_before_the_output_layer() -> None:
    bert, llama, gpt2 = transformers.BertConfig(**SMALL), transformers.LlamaConfig(**SMALL), transformers.GPT2Config
    small_gpt2 = gpt2(vocab_size=23, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    places = {
        transformers.BertModel(bert): ["embeddings"],
        transformers.BertForMaskedLM(bert): ["bert.embeddings", "cls.predictions.decoder"],
        transformers.BertForSequenceClassification(bert): ["bert.embeddings"],
        transformers.LlamaForCausalLM(llama): ["model.embed_tokens", "lm_head"],
        transformers.GPT2LMHeadModel(small_gpt2): ["transformer.wte", "lm_head"],
    }
    for model, expected in places.items():
        adapters = attach(model, Invertible(), seed=0)
        assert [site.path for site in adapters.sites("default")] == expected
        ids = torch.randint(23, (2, 5))
        model.eval()
        stir(adapters)
        out = model(input_ids=ids)[0]
        out.square().sum().backward()
        adapters.check_gradients()
        adapters.activate(None)
        assert not torch.allclose(model(input_ids=ids)[0], out)


def test_what_the_output_layer_reads_is_undone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(23, 8), "head": nn.Linear(8, 23)})
    ids = torch.randint(23, (2, 5))
    base = model["head"](model["embed"](ids))
    adapters = attach(model, Invertible(targets=["embed", "head"], coupling="glow"), seed=0)
    stir(adapters)
    torch.testing.assert_close(model["head"](model["embed"](ids)), base, rtol=0, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(23, 8), "b": nn.Embedding(23, 8), "head": nn.Linear(6, 23)})
    with pytest.raises(TargetError, match="goes after one embedding and before one output layer"):
        attach(model, Invertible(targets=["a", "b"]))
    with pytest.raises(TargetError, match="head reads 6 features, a gives 8"):
        attach(model, Invertible(targets=["a", "head"]))
    with pytest.raises(TargetError, match="no token embedding is recognised"):
        attach(model, Invertible())
    with pytest.raises(TargetError, match="does more than embed tokens"):
        attach(
            transformers.LlamaModel(transformers.LlamaConfig(**SMALL)), Invertible(targets=[lambda path, _: path == ""])
        )
    with pytest.raises(ConfigError, match='coupling is "real_nvp"; it is one of nice, glow'):
        Invertible(coupling="real_nvp")  # type: ignore[arg-type]
    adapters = attach(model, Invertible(targets="a"))
    with pytest.raises(AttachError, match="cannot be weighted"):
        adapters.activate(Weighted(default=0.5))
