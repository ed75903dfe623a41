"""The products of a frozen linear layer and its low-rank change: x W^T and dy W, by one library or another, and x A^T.

PyTorch hands fp32 products on a CPU to MKL, which is slow on processors that are not Intel's; oneDNN, which it has as
well, needs up to a quarter less time there (`benchmarks/kernels.py`).  Sums are rounded in another order, so which one
is used is never left to chance: it is PyTorch's usual one unless `products_by` says otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Library = Literal["usual", "onednn"]
LEAST_ROWS = 16  # below, a product is one reading of W, and packing costs more than it brings
_THIN = 32  # rows of a factor from which on its product is no faster made transposed
_library: Library = "usual"


@contextmanager
def products_by(library: Library) -> Iterator[None]:
    """While the context lasts, fp32 products with frozen weights on a CPU are made by this library.

    "onednn" does nothing where PyTorch was built without it, on other devices, in other dtypes, while compiling, and
    where autograd records: within the hand-written Functions it does not.
    """
    global _library
    before, _library = _library, library if has_onednn() else "usual"
    try:
        yield
    finally:
        _library = before


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b.   x: (..., I)   W: (O, I)   b: (O,)."""
    if _by_onednn(x, W):
        return _onednn(x.reshape(-1, x.shape[-1]), W, b).view(*x.shape[:-1], -1)
    return F.linear(x, W, b)


def times(dy: Tensor, W: Tensor) -> Tensor:
    """dy W.   dy: (N, O)   W: (O, I)."""
    return _onednn(dy, W.T, None) if _by_onednn(dy, W) else torch.mm(dy, W)


def add_times_(dx: Tensor, dy: Tensor, W: Tensor) -> Tensor:
    """dx + dy W, in place.   dx: (N, I)   dy: (N, O)   W: (O, I)."""
    return dx.add_(_onednn(dy, W.T, None)) if _by_onednn(dy, W) else dx.addmm_(dy, W)


def thin(x: Tensor, A: Tensor) -> Tensor:
    """x A^T (N, R) for a factor A of few rows.   x: (N, I)   A: (R, I), transposed or not.

    Below rank 32 a processor makes A x^T, and this is its transpose: the libraries' kernels fill blocks of 32 columns,
    and take up to twice as long for the few of x A^T as for the N of A x^T.
    """
    return torch.mm(A, x.T).T if len(A) < _THIN and x.device.type == "cpu" else torch.mm(x, A.T)


def has_onednn() -> bool:
    """True if this PyTorch was built with it."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _by_onednn(x: Tensor, W: Tensor) -> bool:
    return (
        _library == "onednn"
        and not torch.is_grad_enabled()  # as within the forward and backward of a Function: it has no derivative
        and x.dtype == W.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and not torch.compiler.is_compiling()
    )


def _onednn(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    operators: Any = torch.ops.mkldnn
    result: Tensor = operators._linear_pointwise(x, W, b, "none", [], "")
    return result
