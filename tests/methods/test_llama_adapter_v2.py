"""LLaMA-Adapter V2: its equation by hand, and where it goes."""

from typing import Any

import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, NotMergeable, TargetError
from smidgen.methods.llama_adapter_v2 import LLaMAAdapterV2

from ..formats.models import llama

N = 3


def test_a_layer_is_scaled_after_its_bias_is_added() -> None:
    layer, norm = nn.Linear(3, 5).double(), nn.LayerNorm(5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    s, t = torch.rand(2, 5, dtype=torch.float64)
    h = s * (x @ layer.weight.T + layer.bias + t)  # equation 3
    expected = s * (norm(h) + t)
    model = nn.Sequential(layer, norm)
    adapters = attach(model, LLaMAAdapterV2(targets=["0", "1"]))
    with torch.no_grad():
        for part in adapters.parts("default").values():
            part.s.copy_(s)
            part.t.copy_(t)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    adapters.merge()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)


def test_all_linear_layers_and_norms_of_the_body_and_the_topmost_attentions_are_reached() -> None:
    model: Any = llama()
    outputs = [m.weight.shape[0] for p, m in model.named_modules() if hasattr(m, "weight") and "emb" not in p]
    body = sum(outputs) - model.lm_head.weight.shape[0]
    adapters = attach(model, LLaMAAdapterV2(length=N, layers=1))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * body + N * 32 + 1
    assert "model.layers.1.self_attn" in adapters.parts("default")
    early = attach(llama(), LLaMAAdapterV2(length=N, layers=1, early=True))
    assert "model.layers.0.self_attn" in early.parts("default")
    without = attach(llama(), LLaMAAdapterV2(layers=0))
    assert not [name for name in without.parts("default") if name.endswith("self_attn")]


def test_a_model_without_attention_has_scales_and_biases_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    assert set(attach(model, LLaMAAdapterV2()).parts("default")) == {"0", "1"}
    with pytest.raises(TargetError, match="layers is 1; Sequential has 0"):
        attach(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), LLaMAAdapterV2(layers=1))


def test_what_cannot_be_is_refused() -> None:
    for settings, match in (({"length": 0}, "length is 0"), ({"layers": -1}, "layers is -1")):
        with pytest.raises(ConfigError, match=match):
            LLaMAAdapterV2(**settings)
    with pytest.raises(TargetError, match="layers is 3; LlamaForCausalLM has 2"):
        attach(llama(), LLaMAAdapterV2(layers=3))
    with pytest.raises(NotMergeable):
        attach(llama(), LLaMAAdapterV2(layers=0)).merge()
