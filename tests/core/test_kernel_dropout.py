"""Dropout in the fused frozen linear layer: uint8 masks for entries (N, I) or features (I,)."""

import pytest
import torch
from torch import Tensor

from smidgen import LoRA, Weighted, attach
from smidgen.core.kernels import frozen_linear_low_rank

MASKS = {"none": None, "entries": (6, 5), "features": (5,)}


def inputs(mask: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x (2, 3, 5), W (4, 5), b, A (2, 5), B (4, 2), and a mask or None."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 5), (2, 5), (4, 2)))
    W, b = torch.randn(4, 5, dtype=dtype), torch.randn(4, dtype=dtype)
    shape = MASKS[mask]
    return x, W, b, A, B, None if shape is None else (torch.rand(shape) < 0.7).to(torch.uint8)


def formula(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    dropped = x if mask is None else (x.flatten(0, 1) * mask).view(x.shape)
    return x @ W.T + b + scale * (dropped @ A.T) @ B.T


@pytest.mark.parametrize("mask_on", MASKS)
def test_output_and_gradients_are_those_of_the_formula(mask_on: str):
    x, W, b, A, B, mask = inputs(mask_on)
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    results = [
        (y, *torch.autograd.grad((y * weight).sum(), (x, A, B)))
        for y in (f(x, W, b, A, B, 0.7, mask) for f in (frozen_linear_low_rank, formula))
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask_on", MASKS)
def test_the_second_derivative_is_right(mask_on: str):
    x, W, b, A, B, mask = inputs(mask_on)
    assert torch.autograd.gradgradcheck(
        lambda x, A, B: frozen_linear_low_rank(x, W, b, A, B, 0.7, mask), (x, A, B), atol=1e-6
    )


@pytest.mark.parametrize("mask_on", ["none", "features"])
def test_layers_that_read_one_input_keep_it_once_and_little_else(mask_on: str):
    x, W, b, A, B, mask = inputs(mask_on, torch.bfloat16)
    A, B = A.detach().float().requires_grad_(), B.detach().float().requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = [frozen_linear_low_rank(x, W, b, A, B, 0.7, mask) for _ in range(3)]
    for owned in (x, W, A, B):
        kept.pop(owned.untyped_storage().data_ptr())
    if mask is not None:
        assert kept.pop(mask.untyped_storage().data_ptr()).dtype == torch.uint8
    assert sorted(tuple(tensor.shape) for tensor in kept.values()) == [(6, 2)] * len(ys)


@pytest.mark.parametrize("alone", [True, False], ids=["fused", "as part of a composition"])
@pytest.mark.parametrize("dropout_on", ["elements", "features"])
def test_dropout_drops_its_share_and_keeps_the_mean(dropout_on: str, alone: bool):
    """With A and B ones, the gradient of one output is 1 / keep at the features that were kept and 0 elsewhere."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20_000, 3, bias=False), torch.nn.Identity())
    torch.nn.init.zeros_(model[0].weight)
    settings = LoRA(rank=1, alpha=1, dropout=0.2, dropout_on=dropout_on, targets="0")
    adapters = attach(model, settings)
    if not alone:
        adapters.add(settings, "other")
        adapters.activate(Weighted(default=1.0, other=0.0))
    for parameter in adapters.parameters():
        torch.nn.init.ones_(parameter)
    x = torch.full((2, 20_000), 1 / 20_000, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, torch.ones(2, 3), atol=0.02, rtol=0)
    y[:, 0].sum().backward()
    torch.testing.assert_close(x.grad.unique(), torch.tensor([0, 1 / 0.8]))
    assert bool((x.grad[0] == x.grad[1]).all()) == (dropout_on == "features")
    torch.testing.assert_close(model.eval()(x), torch.ones(2, 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.3])
def test_of_many_entries_each_is_dropped_with_the_probability_that_was_asked_for(dropout: float):
    """Of a few their places are drawn, of many a mask; both as likely in the first as in the last quarter."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1000, 1, bias=False)
    adapters = attach(torch.nn.Sequential(layer), LoRA(rank=1, alpha=1, dropout=dropout, targets="0"))
    for parameter in adapters.parameters():
        torch.nn.init.ones_(parameter)
    torch.nn.init.zeros_(layer.weight)
    x = torch.ones(2000, 1000, requires_grad=True)
    adapters.model(x).sum().backward()
    share = (x.grad == 0).double().mean(0).view(4, 250).mean(1)
    torch.testing.assert_close(share, torch.full_like(share, dropout), atol=0.002, rtol=0)
    torch.testing.assert_close(x.grad.unique(), torch.tensor([0, 1 / (1 - dropout)]))
