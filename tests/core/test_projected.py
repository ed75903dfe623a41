"""Changes that read their input through fixed numbers: the formula of their factors, and nothing else is kept."""

from typing import Any

import pytest
import torch
from torch import nn

from smidgen import attach, quantise
from smidgen.methods.adamss import AdaMSS
from smidgen.methods.lora_fa import LoRAFA
from smidgen.methods.psoft import PSOFT
from smidgen.methods.tinylora import TinyLoRA

METHODS = [AdaMSS(rank=6, subspaces=3, targets="1"), LoRAFA(rank=2, targets="1")]
METHODS += [PSOFT(rank=4, targets="1"), TinyLoRA(rank=3, length=5, targets="1")]


def adapted(method: Any, *, quantised: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(64, 40))
    if quantised:
        quantise(model, "int8", targets="1")
    adapters = attach(model, method.fitted(model), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, next(part for part in adapters.parts("default").values() if hasattr(part, "factors"))


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_outputs_and_gradients_are_those_of_the_factors_and_x_is_not_kept(method: Any, quantised: bool):
    model, part = adapted(method, quantised=quantised)
    x, kept = torch.randn(2, 30, 64, requires_grad=True), []
    shared = getattr(part, "shared", nn.Module())
    learned = [x, *part.parameters(), *shared.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in kept}
    A, B = part.factors()
    W = model[1].weight.dense() if quantised else model[1].weight
    bias = model[1].bias + (part.bias_delta(slice(None)) if method.name == "adamss" else 0)
    expected = x @ W.T + bias + part.scale * x @ A.T @ B.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, learned, dy) for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
