"""The fused backward against autograd of the plain formula."""

import pytest
import torch
from torch import Tensor

from smidgen.core.kernels import (
    frozen_linear_low_rank,
    frozen_linear_low_rank_by_making,
    frozen_linear_stretched,
    linear_by_making,
)
from smidgen.core.projected import frozen_linear_projected
from smidgen.methods.kasa import linear_beside_noise

FAN_IN, FAN_OUT, RANK, SCALE = 3, 5, 2, 1.7


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (2, 4, I), W (O, I), b (O,), A (R, I), B (O, R)"""
    x, W, b = (
        torch.randn(2, 4, FAN_IN, dtype=dtype),
        torch.randn(FAN_OUT, FAN_IN, dtype=dtype),
        torch.randn(FAN_OUT, dtype=dtype),
    )
    A, B = torch.randn(RANK, FAN_IN, dtype=dtype), torch.randn(FAN_OUT, RANK, dtype=dtype)
    return x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()


def formula(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    kept = x if mask is None else (x.reshape(-1, FAN_IN) * mask).view(x.shape)
    return x @ W.T + SCALE * (kept @ A.T) @ B.T + (0 if b is None else b)


def dropout_mask(shape: str | None) -> Tensor | None:
    sizes = {"elements": (8, FAN_IN), "features": (1, FAN_IN)}
    return None if shape is None else torch.empty(sizes[shape], dtype=torch.float64).bernoulli_(0.5).div_(0.5)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mask_shape", [None, "elements", "features"])
@pytest.mark.parametrize("x_trains", [True, False], ids=["x_trains", "x_fixed"])
def test_outputs_and_gradients_are_those_of_the_formula(with_bias: bool, mask_shape: str | None, x_trains: bool):
    x, W, b, A, B = operands()
    x = x.detach().requires_grad_(x_trains)
    mask, trained = dropout_mask(mask_shape), [p for p in (x, A, B) if p.requires_grad]
    b = b if with_bias else None
    y, expected = frozen_linear_low_rank(x, W, b, A, B, SCALE, mask), formula(x, W, b, A, B, mask)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(expected, trained, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(frozen_linear_low_rank(x, W, b, A, B, SCALE, mask), y)


@pytest.mark.parametrize("mask_shape", [None, "elements"])
def test_first_and_second_derivatives_pass_gradcheck(mask_shape: str | None):
    x, W, b, A, B = operands()
    mask = dropout_mask(mask_shape)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return frozen_linear_low_rank(x, W, b, A, B, SCALE, mask)

    assert torch.autograd.gradcheck(run, (x, A, B))
    assert torch.autograd.gradgradcheck(run, (x, A, B))


@pytest.mark.parametrize("mask_shape", [None, "elements", "features"])
@pytest.mark.parametrize("trained", ["A", "B", "both", "neither"])
def test_factors_that_are_made_again_give_the_same_gradients(mask_shape: str | None, trained: str):
    x, W, b, A, B = operands()
    mask = dropout_mask(mask_shape)
    learned = [factor.detach() for factor in (A, B)]
    for factor, name in zip(learned, "AB", strict=True):
        factor.requires_grad_(trained in (name, "both"))
    of = [x, *(factor for factor in learned if factor.requires_grad)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear_low_rank_by_making(x, W, b, lambda: (learned[0].sin(), learned[1].exp()), of[1:], SCALE, mask)
    expected = formula(x, W, b, learned[0].sin(), learned[1].exp(), mask)
    torch.testing.assert_close(y, expected)
    assert any(t is x for t in kept) == (trained in ("A", "both"))
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, of, dy), torch.autograd.grad(expected, of, dy), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_weight_that_is_made_again_gives_the_same_derivatives_and_is_not_kept():
    x, W, b, *_ = operands()
    v, b, kept = torch.randn(FAN_OUT, 1, dtype=torch.float64, requires_grad=True), b.requires_grad_(), []

    def run(x: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return linear_by_making(x, b, lambda: W + v.sin() * W, [v])

    assert torch.autograd.gradcheck(run, (x, b, v))
    assert torch.autograd.gradgradcheck(run, (x, b, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x, b, v)
    torch.testing.assert_close(y, x @ (W + v.sin() * W).T + b)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), v.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_stay_fp32_beside_a_16_bit_base(dtype: torch.dtype):
    x, W, b, A, B = operands()
    x16 = x.detach().to(dtype).requires_grad_()
    masters = [p.detach().float().requires_grad_() for p in (A, B)]
    y = frozen_linear_low_rank(x16, W.to(dtype), b.to(dtype), *masters, SCALE)
    assert y.dtype == dtype
    y.sum().backward()
    assert x16.grad.dtype == dtype
    assert [p.grad.dtype for p in masters] == [torch.float32] * 2
    torch.testing.assert_close(y.double(), formula(x, W, b, A, B), rtol=0.05, atol=0.05)


def test_autocast_computes_in_its_dtype_and_leaves_masters_and_inputs_theirs():
    x, W, b, A, B = (p.detach().float().requires_grad_(p.requires_grad) for p in operands())
    with torch.autocast("cpu", torch.bfloat16):
        y = frozen_linear_low_rank(x, W, b, A, B, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    ours = [p.grad for p in (x, A, B)]
    assert [g.dtype for g in ours] == [torch.float32] * 3
    theirs = torch.autograd.grad(formula(x, W, b, A, B).square().sum(), (x, A, B))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_autocast_leaves_fp64_alone_as_it_does_in_a_plain_layer():
    x, W, b, A, B = operands()
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear_low_rank(x, W, b, A, B, SCALE).dtype == torch.nn.functional.linear(x, W, b).dtype


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(FAN_IN, 4, 2).permute(2, 1, 0),
        lambda: torch.randn(4, 2, FAN_IN).transpose(0, 1),
        lambda: torch.randn(1, 1, FAN_IN).expand(2, 4, FAN_IN),
        lambda: torch.randn(FAN_IN),
        lambda: torch.randn(0, FAN_IN),
        lambda: torch.randn(2, 0, FAN_IN),
    ],
    ids=["permuted", "transposed", "expanded", "one_row", "no_rows", "no_tokens"],
)
def test_any_layout_of_the_input_is_right(view):
    _, W, b, A, B = (p.detach().float() for p in operands())
    A.requires_grad_()
    x = view().requires_grad_()
    y = frozen_linear_low_rank(x, W, b, A, B, SCALE)
    torch.testing.assert_close(y, formula(x, W, b, A, B))
    dy = torch.ones(()).expand(y.shape)  # as sum() gives it: not contiguous
    ours, theirs = (torch.autograd.grad(out, (x, A), dy) for out in (y, formula(x, W, b, A, B)))
    torch.testing.assert_close(ours, theirs)


def test_a_mismatch_of_dtypes_fails_as_in_the_plain_layer():
    x, W, b, A, B = operands()
    with pytest.raises(RuntimeError, match="dtype"):
        frozen_linear_low_rank(x.float(), W, b, A, B, SCALE)


def test_only_the_small_product_is_kept_besides_what_exists_already():
    x, W, b, A, B = operands()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear_low_rank(x, W, b, A, B, SCALE)
    known = {t.data_ptr() for t in (x, W, A, B)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(8, RANK)]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_stretched_outputs_have_the_gradients_of_the_formula(with_bias: bool):
    x, W, b, A, B = operands()
    c = torch.randn(FAN_OUT, dtype=torch.float64, requires_grad=True)
    offset = b if with_bias else None

    def run(x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        return frozen_linear_stretched(x, W, offset, A, B, c, SCALE)

    expected = (1 + c) * formula(x, W, None, A, B) + (b if with_bias else 0)
    torch.testing.assert_close(run(x, A, B, c), expected)
    assert torch.autograd.gradcheck(run, (x, A, B, c))
    assert torch.equal(run(x, A, B, torch.zeros_like(c)), frozen_linear_low_rank(x, W, offset, A, B, SCALE))
    assert torch.autograd.gradgradcheck(run, (x, A, B, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stretched_outputs_under_autocast_or_in_16_bits_keep_the_masters_dtype(dtype: torch.dtype):
    x, W, b, A, B = (p.detach().float().requires_grad_(p.requires_grad) for p in operands())
    c = torch.randn(FAN_OUT, requires_grad=True)
    expected = torch.autograd.grad(((1 + c) * formula(x, W, None, A, B) + b).square().sum(), (A, B, c))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = frozen_linear_stretched(x.to(dtype), W.to(dtype), b.to(dtype), A, B, c, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for parameter, theirs in zip((A, B, c), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - theirs).norm() < 0.03 * theirs.norm()


def test_the_places_that_dropout_drops_do_what_their_mask_does():
    x, W, b, A, B = operands()
    places = torch.tensor([0, 7, 7, 23])
    mask = torch.ones(8 * FAN_IN, dtype=torch.uint8)
    mask[places] = 0
    by_place, by_mask = (
        [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]
        for y in (frozen_linear_low_rank(x, W, b, A, B, SCALE, m) for m in (places, mask.view(8, FAN_IN)))
    )
    assert all(map(torch.equal, by_place, by_mask))
    assert torch.autograd.gradgradcheck(lambda x, A, B: frozen_linear_low_rank(x, W, b, A, B, SCALE, places), (x, A, B))


@pytest.mark.parametrize("mask_shape", [None, "elements", "features", "places"])
@pytest.mark.parametrize("inner", [True, False], ids=["A", "no_A"])
def test_behind_a_fixed_projection_the_gradients_are_those_of_the_formula(inner: bool, mask_shape: str | None):
    x, W, b, _, B = operands()
    P = torch.randn(4 if inner else RANK, FAN_IN, dtype=torch.float64)
    A = torch.randn(RANK, 4, dtype=torch.float64, requires_grad=True) if inner else None
    mask = torch.ones(8, FAN_IN, dtype=torch.uint8)
    mask[0, 1] = mask[5, 2] = 0
    given = {None: None, "elements": mask, "features": mask[0], "places": torch.tensor([1, 17])}[mask_shape]
    applied = torch.ones(()) if given is None else mask[0] if mask_shape == "features" else mask.view(x.shape)
    trained = [p for p in (x, A, B) if p is not None]

    def run(*_: Tensor) -> Tensor:
        return frozen_linear_projected(x, W, b, P, A, B, SCALE, given)

    h = (x * applied) @ P.T
    expected = x @ W.T + b + SCALE * (h if A is None else h @ A.T) @ B.T
    torch.testing.assert_close(run(), expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(run(), trained, dy), torch.autograd.grad(expected, trained, dy))
    assert torch.autograd.gradcheck(run, trained)
    assert torch.autograd.gradgradcheck(run, trained)
    with torch.no_grad():
        torch.testing.assert_close(run(), expected)


def test_behind_a_fixed_projection_what_it_gives_is_all_that_is_kept():
    x, W, b, _, B = operands()
    P, A = torch.randn(4, FAN_IN, dtype=torch.float64), torch.randn(RANK, 4, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear_projected(x, W, b, P, A, B, SCALE)
    known = {t.data_ptr() for t in (W, P, A, B)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(8, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_a_fixed_projection_masters_keep_their_dtype(dtype: torch.dtype):
    x, W, b, _, B = (p.detach().float().requires_grad_(p.requires_grad) for p in operands())
    P, A = torch.randn(4, FAN_IN), torch.randn(RANK, 4, requires_grad=True)
    expected = torch.autograd.grad((x @ W.T + b + SCALE * x @ P.T @ A.T @ B.T).square().sum(), (A, B))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y = frozen_linear_projected(x.to(dtype), W.to(dtype), b.to(dtype), P, A, B, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for parameter, theirs in zip((A, B), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("x_trains", [True, False], ids=["x_trains", "x_fixed"])
def test_beside_a_fixed_change_the_gradients_are_those_of_the_formula(x_trains: bool):
    x, W, b, A, B = operands()
    x, d = x.detach().requires_grad_(x_trains), torch.randn(RANK, dtype=torch.float64, requires_grad=True)
    A0, B0 = torch.randn(RANK, FAN_IN, dtype=torch.float64), torch.randn(FAN_OUT, RANK, dtype=torch.float64)
    trained = [p for p in (x, A, B, d) if p.requires_grad]

    def run(*_: Tensor) -> Tensor:
        return linear_beside_noise(x, W, b, A, B, d, A0, B0, SCALE)

    expected = x @ W.T + b + SCALE * x @ (B @ d.diag() @ A + B0 @ A0).T
    torch.testing.assert_close(run(), expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(run(), trained, dy), torch.autograd.grad(expected, trained, dy))
    assert torch.autograd.gradcheck(run, trained)
    assert torch.autograd.gradgradcheck(run, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_a_fixed_change_masters_keep_their_dtype_and_little_is_kept(dtype: torch.dtype):
    x, W, b, A, B = (p.detach().float().requires_grad_(p.requires_grad) for p in operands())
    d, A0, B0 = torch.randn(RANK, requires_grad=True), torch.randn(RANK, FAN_IN), torch.randn(FAN_OUT, RANK)
    expected = torch.autograd.grad((x @ W.T + b + SCALE * x @ (B @ d.diag() @ A + B0 @ A0).T).square().sum(), (A, B, d))
    kept: list[Tensor] = []
    inputs = [t.to(dtype) for t in (x, W, b)]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = linear_beside_noise(*inputs, A, B, d, A0, B0, SCALE)
    assert y.dtype == torch.bfloat16
    if dtype == torch.bfloat16:
        known = {t.data_ptr() for t in (*inputs, A, B, d, A0, B0)}
        assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(8, RANK)]
    y.float().square().sum().backward()
    for parameter, theirs in zip((A, B, d), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - theirs).norm() < 0.03 * theirs.norm()
