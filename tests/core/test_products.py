"""Products with a frozen weight: the same numbers by either library, and only where it was asked for."""

import pytest
import torch
import torch.nn.functional as F

import smidgen
from smidgen.core import products
from smidgen.core.products import add_times_, linear, products_by, thin, times

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _unrecorded():
    with torch.no_grad():
        yield


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((4, 9, 12), (20, 12), (20,), (36, 20))]


@needs_onednn
def test_onednn_makes_the_products_of_the_usual_library(operands):
    x, W, b, dy = operands
    with products_by("onednn"):
        assert products._by_onednn(x, W)
        y, z, dx = linear(x, W, b), linear(x, W, None), times(dy, W)
        added = add_times_(torch.ones(36, 12), dy, W)
    exact = [t.double() for t in operands]
    torch.testing.assert_close(y.double(), F.linear(*exact[:3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.double(), F.linear(*exact[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact[3] @ exact[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(added.double(), 1 + exact[3] @ exact[1], rtol=0, atol=1e-5)
    assert y.shape == (4, 9, 20)


@needs_onednn
def test_an_input_whose_rows_are_not_in_order_is_multiplied_right(operands):
    x, W, b, _ = operands
    turned = x.transpose(0, 1)
    with products_by("onednn"):
        torch.testing.assert_close(linear(turned, W, b), F.linear(turned, W, b), rtol=0, atol=1e-5)
        torch.testing.assert_close(times(torch.ones(20, 36).T, W), torch.ones(36, 20) @ W, rtol=0, atol=1e-5)


def test_nothing_changes_unless_it_is_asked_for_and_after_the_context(operands):
    x, W, b, dy = operands
    assert not products._by_onednn(x, W)
    assert torch.equal(linear(x, W, b), F.linear(x, W, b))
    with pytest.raises(KeyError), products_by("onednn"):
        raise KeyError
    assert torch.equal(times(dy, W), dy @ W)
    assert torch.equal(add_times_(torch.ones(36, 12), dy, W), torch.ones(36, 12).addmm_(dy, W))
    assert not products._by_onednn(x, W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_few_rows_stay_with_the_usual_library(operands, dtype):
    x, W, b, _ = (t.to(dtype) for t in operands)
    with products_by("onednn"):
        assert not products._by_onednn(x, W)
        assert torch.equal(linear(x, W, b), F.linear(x, W, b))
        assert not products._by_onednn(torch.ones(3, 12), torch.ones(20, 12))


@needs_onednn
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_lora_step_is_the_same_by_either_library(dropout):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 40), torch.randn(64, 48)
    adapters = smidgen.attach(layer, smidgen.LoRA(rank=4, targets="", dropout=dropout), seed=0)
    torch.nn.init.normal_(adapters.parameters()[1])
    found = {}
    for library in ("usual", "onednn"):
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        with torch.enable_grad(), products_by(library):
            y = layer(inputs)
            y.square().sum().backward()
        found[library] = [y.detach(), inputs.grad, *(p.grad.clone() for p in adapters.parameters())]
        layer.zero_grad()
    for usual, other in zip(found["usual"], found["onednn"], strict=True):
        torch.testing.assert_close(other, usual, rtol=1e-5, atol=1e-3)


@needs_onednn
def test_what_autograd_records_is_left_to_the_usual_library(operands):
    x, W, b, _ = operands
    with torch.enable_grad(), products_by("onednn"):
        assert linear(x.requires_grad_(), W, b).requires_grad


@pytest.mark.parametrize("rank", [1, 8, 16, 31, 32, 40])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_product_of_a_thin_factor_is_right_in_either_layout(rank, is_transposed):
    generator = torch.Generator().manual_seed(0)
    x, A = torch.randn(30, 24, generator=generator), torch.randn(rank, 24, generator=generator)
    given = A.T.contiguous().T if is_transposed else A
    torch.testing.assert_close(thin(x, given).double(), x.double() @ A.double().T, rtol=0, atol=1e-5)
    assert thin(x, given).shape == (30, rank)
