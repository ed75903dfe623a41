"""RotationAdapter: what all methods share that turn the input of a layer by a (nearly) orthogonal matrix.

    y' = W R^T x + b            W' = W R^T            R: (D, D)

D is the fan-in I, and the input is turned, never the weight, except where the input is no vector of I numbers: on
convolutions and at parameters the weight is turned (`by_weight`), and of an embedding its vectors: y' = R^T y, D = O.
All experts of a stack are turned alike.

Orthogonal matrices come from skew-symmetric ones, Q = -Q^T, by Cayley's transform or by its Neumann series:
    R = (I + Q)(I - Q)^-1  =  I + 2 Q + 2 Q^2 + ...
Computed is R - I, so that a small turn is not rounded away in 16 bits, and a turn of zero leaves every bit.
"""

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Call
from .layers import ConvKind, EmbeddingKind
from .site import Site


class RotationAdapter(Adapter):
    """A subclass has its parameters and `turned`."""

    in_blocks = False  # an embedding's rows are turned into each other

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.turns_output = isinstance(site.kind, EmbeddingKind)

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Rows x (..., D) as x R, or x R^T if `back`; in the dtype of x."""
        raise NotImplementedError

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.turns_output:
            return self.turned(call(x, *args, **kwargs))
        return call(self.turned(x), *args, **kwargs)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return (self.turned(W.T).T if self.turns_output else self.turned(W, back=True)), b


def width(site: Site) -> int:
    """D: how many numbers are turned."""
    return site.fan_out if isinstance(site.kind, EmbeddingKind) else site.fan_in


def turns_weight(site: Site) -> bool:
    """True where the weight has to be turned, because the layer's input is no vector of I numbers."""
    return isinstance(site.kind, ConvKind)


def upper_places(size: int) -> Tensor:
    """Where the size (size - 1) / 2 numbers above the diagonal stand in a flat matrix."""
    places: Tensor = torch.triu_indices(size, size, 1)
    return places[0] * size + places[1]


def skew(upper: Tensor, places: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices (n, size, size) of the numbers (n, size (size - 1) / 2) above their diagonals."""
    above = upper.new_zeros(len(upper), size * size).index_copy(1, places, upper).view(-1, size, size)
    return above - above.mT


def cayley(Q: Tensor, terms: int = 0) -> Tensor:
    """R - I (n, size, size) of skew-symmetric Q.

    terms: 0 for Cayley's transform itself; else I + 2 Q + ... + 2 Q^(terms - 2) + Q^(terms - 1), orthogonal up to
    Q^terms.   Qiu et al. 2025 (OFTv2), arXiv:2506.19847, section 3.3.
    """
    with torch.autocast(Q.device.type, enabled=False):  # small, and it should stay orthogonal
        if not terms:
            eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
            D: Tensor = torch.linalg.solve(eye - Q, 2 * Q, left=False)
            return D
        D = Q
        for _ in range(terms - 2):
            D = torch.baddbmm(Q, Q, D, beta=2)
        return D


def turned_blockwise(x: Tensor, D: Tensor) -> Tensor:
    """x + x D, block by block.   x: (..., blocks size)   D: (blocks, size, size), or one block for all."""
    D = D.to(x.dtype)
    if torch.compiler.is_compiling() or not D.requires_grad or not torch.is_grad_enabled():
        return _plus_blockwise(x, D)
    result: Tensor = _Blockwise.apply(x, D)  # type: ignore[no-untyped-call]
    return result


class _Blockwise(torch.autograd.Function):
    """Every copy of x that autograd would make is left out: of blocks this small, copies are most of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, D)
        return _plus_blockwise(x, D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, D = ctx.saved_tensors
        dx = _plus_blockwise(dy, D.mT) if ctx.needs_input_grad[0] else None
        return dx, torch.bmm(_blocks(x, D).mT, _blocks(dy, D))


def _plus_blockwise(x: Tensor, D: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or D.requires_grad)):
        return x + torch.bmm(_blocks(x, D), D).transpose(0, 1).reshape(x.shape)
    y = x.clone(memory_format=torch.contiguous_format)
    _blocks(y, D).baddbmm_(_blocks(x, D), D)
    return y


def _blocks(x: Tensor, D: Tensor) -> Tensor:
    """x (..., blocks size) as (blocks, N, size); as (1, N blocks, size) where all blocks share one D."""
    blocks, size = len(D), D.shape[-1]
    return x.reshape(-1, blocks, size).transpose(0, 1)
