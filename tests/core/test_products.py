"""Products with a frozen weight: the same numbers by either library, and only where it was asked for."""

import pytest
import torch
import torch.nn.functional as F

from smidgen.core import products
from smidgen.core.products import linear, products_by, quicker_library, times

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


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
    exact = [t.double() for t in operands]
    torch.testing.assert_close(y.double(), F.linear(*exact[:3]), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.double(), F.linear(*exact[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact[3] @ exact[1], rtol=0, atol=1e-5)
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
    assert not products._by_onednn(x, W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_few_rows_stay_with_the_usual_library(operands, dtype):
    x, W, b, _ = (t.to(dtype) for t in operands)
    with products_by("onednn"):
        assert not products._by_onednn(x, W)
        assert torch.equal(linear(x, W, b), F.linear(x, W, b))
        assert not products._by_onednn(torch.ones(3, 12), torch.ones(20, 12))


def test_the_quicker_library_is_measured():
    library, faster = quicker_library(64, 48, 32)
    assert library == ("onednn" if faster > 1.05 else "usual")
    assert quicker_library(1, 48, 32) == ("usual", 1.0)
