"""The chunked cross entropy against F.cross_entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.core.errors import ConfigError
from smidgen.core.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_rows

ROWS, SIZE, VOCABULARY = 10, 4, 7
SHAPES = [
    {},
    {"label_smoothing": 0.1},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"softcap": 2.0, "scale": 1.7, "label_smoothing": 0.2},
]


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (2, 5, D), W (V, D), b (V,) and targets (2, 5) of which three are ignored"""
    h, W, b = (torch.randn(*size, dtype=dtype) for size in ((2, 5, SIZE), (VOCABULARY, SIZE), (VOCABULARY,)))
    targets = torch.randint(VOCABULARY, (2, 5))
    targets[0, 1:3] = targets[1, 4] = -100
    return h.requires_grad_(), W, b, targets


def formula(
    h: Tensor,
    W: Tensor,
    b: Tensor | None,
    targets: Tensor,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    z = scale * F.linear(h, W, b).reshape(-1, VOCABULARY)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, targets.reshape(-1), reduction="none", label_smoothing=label_smoothing).view_as(targets)


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("head", ["frozen", "trained", "function"])
def test_losses_and_gradients_are_those_of_all_logits(head: str, with_bias: bool, shape: dict, chunk: int | None):
    h, W, b, targets = operands()
    b = b if with_bias else None
    trained = [h]
    if head != "frozen":
        trained += [p.requires_grad_() for p in (W, b) if p is not None]
    given = (lambda rows: F.linear(rows, W)) if head == "function" else W
    losses, _ = linear_cross_entropy_rows(h, given, b, targets, chunk=chunk, **shape)
    expected = formula(h, W, b, targets, **shape)
    torch.testing.assert_close(losses, expected)
    above = torch.randn_like(losses)
    torch.testing.assert_close(
        torch.autograd.grad(losses, trained, above), torch.autograd.grad(expected, trained, above)
    )
    total = linear_cross_entropy(h, given, b, targets, chunk=chunk, **shape)
    torch.testing.assert_close(total, expected.sum())


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)], ids=["h", "W", "b", "all"])
def test_gradients_pass_gradcheck(trained: tuple[int, ...]):
    h, W, b, targets = operands()
    tensors = [p.detach().requires_grad_(i in trained) for i, p in enumerate((h, W, b))]
    assert torch.autograd.gradcheck(
        lambda *three: linear_cross_entropy(*three, targets, chunk=3, softcap=3.0, scale=0.7, label_smoothing=0.1),
        tensors,
    )


def test_the_target_with_the_largest_logit_is_right_and_an_ignored_row_never():
    h, W, b, targets = operands()
    _, right = linear_cross_entropy_rows(h, W, b, targets, chunk=3)
    _, through_function = linear_cross_entropy_rows(h, lambda rows: F.linear(rows, W, b), None, targets, chunk=3)
    expected = F.linear(h, W, b).argmax(2) == targets
    assert expected.any()
    assert torch.equal(right, expected)
    assert torch.equal(through_function, expected)
    one_logit = torch.zeros(VOCABULARY, SIZE, dtype=torch.float64)  # all tie: only one class can be said
    _, right = linear_cross_entropy_rows(h, one_logit, None, torch.ones_like(targets))
    assert int(right.sum()) in (0, targets.numel())
    assert torch.equal(right, (h @ one_logit.T).argmax(2) == 1)


def test_ignored_rows_are_not_multiplied_and_get_no_gradient():
    h, W, b, targets = operands()
    with torch.no_grad():
        h[targets == -100] = float("nan")
    loss = linear_cross_entropy(h, W, b, targets)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(h.grad.abs().sum(-1) > 0, targets != -100)
    other = torch.where(targets == -100, 3, targets)
    assert linear_cross_entropy(h, W, b, other, ignore_index=3).isfinite()


@pytest.mark.parametrize("head", ["frozen", "trained", "function"])
def test_nothing_to_count_is_zero_with_zero_gradients(head: str):
    h, W, b, targets = operands()
    W.requires_grad_(head == "trained")
    given = (lambda rows: F.linear(rows, W, b)) if head == "function" else W
    loss = linear_cross_entropy(h, given, None, torch.full_like(targets, -100))
    loss.backward()
    assert loss.detach() == 0
    assert h.grad is None or not h.grad.any()
    assert W.grad is None or not W.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_summed_in_fp32(dtype: torch.dtype):
    torch.manual_seed(0)
    h, W = torch.randn(64, 32), torch.randn(5000, 32) * 0.3
    targets = torch.randint(5000, (64,))
    exact = h.to(dtype).double().requires_grad_()
    expected = F.cross_entropy(exact @ W.to(dtype).double().T, targets, reduction="sum")
    h16 = h.to(dtype).requires_grad_()
    loss = linear_cross_entropy(h16, W.to(dtype), None, targets, chunk=16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    (ours,), (theirs,) = torch.autograd.grad(loss, h16), torch.autograd.grad(expected, exact)
    assert ours.dtype == dtype
    assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_the_gradient_of_a_trained_16_bit_head_is_summed_over_chunks_in_fp32():
    h, W = torch.randn(256, 8).bfloat16(), torch.randn(11, 8).bfloat16().requires_grad_()
    targets = torch.randint(11, (256,))
    (ours,) = torch.autograd.grad(linear_cross_entropy(h, W, None, targets, chunk=1), W)
    exact = W.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(F.cross_entropy(h.double() @ exact.T, targets, reduction="sum"), exact)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("as_function", [False, True], ids=["weight", "function"])
def test_autocast_multiplies_in_its_dtype_and_gives_gradients_in_the_inputs(as_function: bool):
    h, W, b, targets = (p.detach().float() if p.is_floating_point() else p for p in operands())
    trained = [h.requires_grad_(), W.requires_grad_(), b.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        seen = []

        def head(rows: Tensor) -> Tensor:
            seen.append(F.linear(rows, W, b))
            return seen[-1]

        given = (head, None) if as_function else (W, b)
        loss = linear_cross_entropy(h, *given, targets)
    assert all(u.dtype == torch.bfloat16 for u in seen)
    assert loss.dtype == torch.float32
    ours = torch.autograd.grad(loss, trained)
    for one, other in zip(ours, torch.autograd.grad(formula(h, W, b, targets).sum(), trained), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.03 * other.norm()


@pytest.mark.parametrize("as_function", [False, True], ids=["weight", "function"])
def test_without_gradients_nothing_is_kept_and_the_losses_are_the_same(as_function: bool):
    h, W, b, targets = operands()
    given = (lambda rows: F.linear(rows, W, b)) if as_function else W
    expected, _ = linear_cross_entropy_rows(h, given, None if as_function else b, targets)
    with torch.no_grad():
        losses, _ = linear_cross_entropy_rows(h, given, None if as_function else b, targets)
    assert not losses.requires_grad
    assert torch.equal(losses, expected)
    losses, _ = linear_cross_entropy_rows(h.detach(), W, b, targets)
    assert not losses.requires_grad


def test_a_second_derivative_is_refused():
    h, W, b, targets = operands()
    loss = linear_cross_entropy(h, W, b, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize("head", ["frozen", "trained", "function"])
def test_no_tensor_of_all_rows_by_the_vocabulary_is_made_or_kept(head: str):
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, vocabulary = 64, 500
    h, W = torch.randn(rows, SIZE, requires_grad=True), torch.randn(vocabulary, SIZE, requires_grad=head == "trained")
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, Tensor) and one.data_ptr() != W.data_ptr():
                    largest = max(largest, one.numel())
            return made

    kept: list[Tensor] = []
    given = (lambda some: F.linear(some, W)) if head == "function" else W
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = linear_cross_entropy(h, given, None, torch.randint(vocabulary, (rows,)), chunk=8)
        at_most = max((t.numel() for t in kept if t.data_ptr() != W.data_ptr()), default=0)
        loss.backward()
    assert at_most <= rows * SIZE
    assert largest <= max(8 * vocabulary, W.numel())


def test_a_frozen_head_keeps_one_gradient_of_the_size_of_its_input():
    h, W, b, targets = operands()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy_rows(h, W, b, targets)
    assert [t.numel() for t in kept] == [h.numel()]


def test_a_plain_linear_layer_is_taken_by_its_weight_and_one_with_a_hook_is_called():
    h, _, _, targets = operands()
    layer = nn.Linear(SIZE, VOCABULARY).double().requires_grad_(False)
    expected = formula(h, layer.weight, layer.bias, targets).sum()
    torch.testing.assert_close(linear_cross_entropy(h, layer, None, targets), expected)
    more = torch.randn(VOCABULARY, dtype=torch.float64)
    expected = formula(h, layer.weight, layer.bias + more, targets).sum()
    torch.testing.assert_close(linear_cross_entropy(h, layer, more, targets), expected)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    doubled = formula(h, 2 * layer.weight, 2 * layer.bias, targets).sum()
    torch.testing.assert_close(linear_cross_entropy(h, layer, None, targets), doubled)


def test_dropout_in_a_head_is_the_same_in_forward_and_backward():
    h, W, _, targets = operands()
    h = (h.detach() + 3).requires_grad_()
    masks: list[Tensor] = []

    def head(rows: Tensor) -> Tensor:
        masks.append(F.dropout(torch.ones_like(rows), 0.5))
        return F.linear(rows * masks[-1], W)

    linear_cross_entropy(h, head, None, targets, chunk=10).backward()
    first, again = masks
    assert torch.equal(first, again)
    assert torch.equal(h.grad[targets != -100] != 0, first != 0)


def test_all_that_does_not_fit_is_refused_together():
    h, W, b, targets = operands()
    with pytest.raises(ConfigError) as found:
        linear_cross_entropy(h, W[:, 1:], b[1:], targets.T, chunk=0)
    assert str(found.value) == (
        f"h (2, 5, {SIZE}) wants targets (2, 5); they are (5, 2); "
        f"h (2, 5, {SIZE}) wants a weight (V, {SIZE}); it is ({VOCABULARY}, {SIZE - 1}); "
        f"the weight ({VOCABULARY}, {SIZE - 1}) wants a bias ({VOCABULARY},); it is ({VOCABULARY - 1},); "
        "chunk is 0; at least one row's logits exist at a time"
    )
