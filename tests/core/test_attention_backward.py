"""The backward pass of attention in bfloat16 on a processor."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from smidgen.core.attention_backward import LONGEST, short_attention_backward_in_fp32

N, H, D = 3, 2, 16


def tensors(length, keys=None, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    sizes = (length, keys or length, keys or length)
    drawn = [torch.randn(N, size, H, D, generator=generator).transpose(1, 2) for size in sizes]
    return [x.to(dtype).requires_grad_() for x in drawn]


def gradients(inputs, **settings):
    y = F.scaled_dot_product_attention(*inputs, **settings)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, inputs, weights)


def exact(inputs, **settings):
    """By the formula, in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    if (mask := settings.get("attn_mask")) is not None and mask.dtype != torch.bool:
        settings["attn_mask"] = mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return gradients(wide, **settings)


def masked(length, keys, kind):
    mask = torch.ones(N, 1, length, keys, dtype=torch.bool)
    mask[1, :, :, keys - 3 :] = False
    return mask if kind == "bool" else torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, float("-inf"))


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "bool": {"attn_mask": masked(9, 9, "bool")},
    "added": {"attn_mask": masked(9, 9, torch.bfloat16)},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case):
    inputs, settings = tensors(9), CASES[case]
    with short_attention_backward_in_fp32():
        found = gradients(inputs, **settings)
    usual, truth = gradients(inputs, **settings), exact(inputs, **settings)
    for ours, theirs, right in zip(found, usual, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        errors = [float((x.double() - right).norm() / right.norm()) for x in (ours, theirs)]
        assert errors[0] < 1e-2
        assert errors[0] <= 1.05 * errors[1]


def test_queries_of_another_number_than_keys():
    inputs = tensors(5, 12)
    with short_attention_backward_in_fp32():
        found = gradients(inputs)
    for ours, right in zip(found, exact(inputs), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("length", "dtype"), [(LONGEST + 1, torch.bfloat16), (9, torch.float32), (9, torch.float64)])
def test_long_rows_and_other_dtypes_are_left_as_they_are(length, dtype):
    inputs = tensors(length, dtype=dtype)
    usual = gradients(inputs)
    with short_attention_backward_in_fp32():
        assert all(map(torch.equal, gradients(inputs), usual))


def test_it_ends_with_the_context_whatever_happens_there():
    inputs = tensors(9)
    usual = gradients(inputs)
    with short_attention_backward_in_fp32():
        with pytest.raises(ValueError, match="torn"), short_attention_backward_in_fp32():
            raise ValueError("torn")
        wide = gradients(inputs)  # the inner context has not ended the outer one
    assert not all(map(torch.equal, usual, wide))
    assert all(map(torch.equal, gradients(inputs), usual))


def test_autocast_and_a_frozen_input():
    """As in training: autocast makes bfloat16 of fp32, and only some inputs want a gradient."""
    q, k, v = tensors(9, dtype=torch.float32)
    k.requires_grad_(False)
    with short_attention_backward_in_fp32(), torch.autocast("cpu", torch.bfloat16):
        y = F.scaled_dot_product_attention(q, k, v)
        dq, dv = torch.autograd.grad(y, (q, v), torch.ones_like(y))
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with short_attention_backward_in_fp32():
        y = F.scaled_dot_product_attention(*rounded)
        expected = torch.autograd.grad(y, (rounded[0], rounded[2]), torch.ones_like(y))
    assert torch.equal(dq, expected[0].float())
    assert torch.equal(dv, expected[1].float())
