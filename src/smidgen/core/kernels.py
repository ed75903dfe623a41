"""The hand-written backward of a frozen linear layer with a low-rank change.

    y = x W^T + b + s (x A^T) B^T          x: (..., I)   W: (O, I)   A: (R, I)   B: (O, R)

W and b get no gradient.  Kept for backward: x (shared by all layers that read it) and, if B is trained, x A^T.
    g  = s dy B                 (N, R)
    dA = g^T x                  (R, I)
    dB = s dy^T (x A^T)         (O, R)
    dx = dy W + g A             (N, I), accumulated in place
Hu et al. 2021, arXiv:2106.09685, equation 3.  B A is never formed.

Dropout's mask m stands at x in (m x) A^T; one that all rows share, (I,), may as well stand at the columns of A.
Where few entries are dropped, their places say it in fewer bytes and less time than a mask.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import linear, times
from .site import compute_dtype

_THIN = 64  # the largest rank of factors that are small enough to be laid out anew


class _FrozenLinearLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, scale, mask)
        ctx.save_for_backward(x, W, A, B, h if ctx.needs_input_grad[4] else None, mask)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, A, B, h, mask = ctx.saved_tensors
        of_x, _, _, of_A, of_B, *_ = ctx.needs_input_grad
        dx, dA, dB = _backward(dy, x, W, A, B, h, mask, ctx.scale, (of_x, of_A, of_B))
        return dx, None, None, dA, dB, None, None


class _FrozenLinearLowRankOfMade(torch.autograd.Function):
    """The same of x = make(*made_of), which is made again in backward and kept by nobody."""

    @staticmethod
    def forward(
        ctx: Any,
        make: Callable[..., Tensor],
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        mask: Tensor | None,
        *made_of: Tensor,
    ) -> Tensor:
        y, h = _forward(make(*made_of), W, b, A, B, scale, mask)
        ctx.save_for_backward(W, A, B, h if ctx.needs_input_grad[4] else None, mask, *made_of)
        ctx.make, ctx.scale = make, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        W, A, B, h, mask, *made_of = ctx.saved_tensors
        _, _, _, of_A, of_B, _, _, *of_made = ctx.needs_input_grad
        x, pull = remake(ctx.make, made_of, of_made)
        dx, dA, dB = _backward(dy, x, W, A, B, h, mask, ctx.scale, (any(of_made), of_A, of_B))
        return None, None, None, dA, dB, None, None, *pull(dx)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], *made_of: Tensor) -> Tensor:
        ctx.save_for_backward(*made_of)
        device = made_of[0].device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.make, ctx.autocast = make, partial(torch.autocast, device, dtype, enabled)
        return make(*made_of)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with ctx.autocast():
            _, pull = remake(ctx.make, ctx.saved_tensors, ctx.needs_input_grad[1:])
        return None, *pull(dy)


def remade(make: Callable[..., Tensor], *made_of: Tensor) -> Tensor:
    """make(*made_of), of which nothing but these inputs is kept: backward makes it again."""
    result: Tensor = _Remade.apply(make, *made_of)  # type: ignore[no-untyped-call]
    return result


Pull = Callable[[Tensor | None], tuple[Tensor | None, ...]]


def remake(make: Callable[..., Tensor], made_of: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, Pull]:
    """In a backward: x = make(*made_of), and what takes the gradient of x to those of what it is made of.

    needed: which of these are asked for; the others get None.
    """
    again = torch.is_grad_enabled()  # this backward is itself differentiated
    with torch.enable_grad():
        inputs = [t if again else t.detach().requires_grad_(need) for t, need in zip(made_of, needed, strict=True)]
        x = make(*inputs)

    def pull(dx: Tensor | None) -> tuple[Tensor | None, ...]:
        if dx is None:
            return tuple(None for _ in inputs)
        asked = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(x, asked, dx, create_graph=again))
        return tuple(next(found) if need else None for need in needed)

    return x if again else x.detach(), pull


def frozen_linear_low_rank(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """x W^T + b + scale (x * mask) A^T B^T, with gradients for x, A and B only.

    x: (..., I).   mask: 1 where dropout keeps, 0 where it drops, uint8: (N, I) for entries of x, or (I,) for features;
    or, int64, the places in x.flatten() that it drops, in any order, any of them more than once.
    What is kept is not scaled up: that is the caller's, in `scale`.
    Under autocast everything runs in its dtype, as the frozen layer alone would.
    """
    if torch.is_autocast_enabled(x.device.type):
        return _outside_autocast(frozen_linear_low_rank, x, W, b, A, B, scale, mask)
    if torch.is_grad_enabled():
        result: Tensor = _FrozenLinearLowRank.apply(x, W, b, A, B, scale, mask)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, W, b, A, B, scale, mask)[0]


def frozen_linear_low_rank_of_made(
    make: Callable[..., Tensor],
    made_of: Sequence[Tensor],
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The same of x = make(*made_of), with gradients for these, A and B.  Not for autocast."""
    result: Tensor = _FrozenLinearLowRankOfMade.apply(make, W, b, A, B, scale, mask, *made_of)  # type: ignore[no-untyped-call]
    return result


class _FrozenLinearLowRankByMaking(torch.autograd.Function):
    """The same of A and B = make(), which are made again in backward and kept by nobody, of the parameters `learned`.

    Kept: x if A is trained, x A^T if B is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        make: Callable[[], tuple[Tensor, Tensor]],
        scale: float,
        mask: Tensor | None,
        *learned: Tensor,
    ) -> Tensor:
        with torch.enable_grad():
            A, B = make()
        y, h = _forward(x, W, b, A.detach(), B.detach(), scale, mask)
        ctx.save_for_backward(W, x if A.requires_grad else None, h if B.requires_grad else None, mask, *learned)
        ctx.make, ctx.scale, ctx.learned = make, scale, learned
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        W, x, h, mask, *_ = ctx.saved_tensors  # and looked whether the parameters have changed since
        with torch.autocast(dy.device.type, enabled=False):  # as the forward was
            with torch.enable_grad():
                A, B = ctx.make()
            needed = (ctx.needs_input_grad[0], A.requires_grad, B.requires_grad)
            dx, dA, dB = _backward(dy, x, W, A.detach(), B.detach(), h, mask, ctx.scale, needed)
            trained = [(factor, d) for factor, d in ((A, dA), (B, dB)) if d is not None]
            if not trained:
                return dx, *[None] * (5 + len(ctx.learned))
            factors, gradients = zip(*trained, strict=True)
            # by the parameters of the forward, not the saved ones: checkpointing hands back copies
            found = torch.autograd.grad(factors, ctx.learned, gradients, allow_unused=True)
        return dx, None, None, None, None, None, *found


def frozen_linear_low_rank_by_making(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    make: Callable[[], tuple[Tensor, Tensor]],
    learned: Sequence[Tensor],
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """`frozen_linear_low_rank` of A and B = make(), with gradients for x and the parameters that these are made of.

    For factors that are large beside x and made of little: they are made twice and not kept.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
        return frozen_linear_low_rank(x, W, b, *make(), scale, mask)

    def run(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        result: Tensor = _FrozenLinearLowRankByMaking.apply(x, W, b, make, scale, mask, *learned)  # type: ignore[no-untyped-call]
        return result

    return _outside_autocast(run, x, W, b) if torch.is_autocast_enabled(x.device.type) else run(x, W, b)


class _LinearByMaking(torch.autograd.Function):
    """y = x W^T + b of W = make(), which is made again in backward, of the tensors `learned`.   Kept: x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor | None, make: Callable[[], Tensor], *learned: Tensor) -> Tensor:
        ctx.save_for_backward(x, *learned)
        ctx.make, ctx.learned = make, learned
        return linear(x, make(), b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *_ = ctx.saved_tensors  # and looked whether what W is made of has changed since
        again = torch.is_grad_enabled()  # this backward is itself differentiated
        with torch.enable_grad():
            W = ctx.make()
        of_x, of_b, *_ = ctx.needs_input_grad
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dx = times(dy_rows, W if again else W.detach()).view(x.shape) if of_x else None
        dW = torch.mm(dy_rows.T, x.reshape(-1, x.shape[-1]))
        # by the tensors of the forward, not the saved ones: checkpointing hands back copies
        found = torch.autograd.grad(W, ctx.learned, dW, create_graph=again, allow_unused=True)
        return dx, dy_rows.sum(0) if of_b else None, None, *found


def linear_by_making(x: Tensor, b: Tensor | None, make: Callable[[], Tensor], learned: Sequence[Tensor]) -> Tensor:
    """x W^T + b of W = make(), which nobody keeps; gradients for x, b and what W is made of.  Not for autocast."""
    is_needless = not learned or not torch.is_grad_enabled()
    if is_needless or torch.compiler.is_compiling():  # a compiler decides itself what to keep
        return F.linear(x, make(), b)
    result: Tensor = _LinearByMaking.apply(x, b, make, *learned)  # type: ignore[no-untyped-call]
    return result


class _FrozenLinearStretched(torch.autograd.Function):
    """As above with the outputs stretched: z = x W^T + s (x A^T) B^T, y = z + b + c * z.

    c has a gradient and W's and b's have none.  Kept: x, x A^T, and z + b.
        dz = dy * (1 + c)           (N, O), and from there on as above
        dc = sum_n dy * z           (O,)
    Where c is zero, y is the layer's and the change's own to the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor, scale: float
    ) -> Tensor:
        y, h = _forward(x, W, b, A, B, scale, None)
        stretch = c.to(y.dtype)
        ctx.save_for_backward(x, W, b, A, B, c, h, y if ctx.needs_input_grad[5] else None)
        ctx.scale = scale
        stretched = torch.addcmul(y, y, stretch)
        return stretched if b is None else stretched.sub_(stretch * b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, b, A, B, c, h, y = ctx.saved_tensors
        of_x, _, _, of_A, of_B, of_c, _ = ctx.needs_input_grad
        dc = None
        if of_c:
            if torch.is_grad_enabled():  # as in `_backward`
                y, _ = _forward(x, W, b, A, B, ctx.scale, None)
            dy_rows = dy.reshape(-1, dy.shape[-1])
            dc = (dy_rows * y.view(dy_rows.shape)).sum(0, dtype=c.dtype)
            if b is not None:
                dc -= b * dy_rows.sum(0, dtype=c.dtype)
        dz = torch.addcmul(dy, dy, c.to(dy.dtype))
        dx, dA, dB = _backward(dz, x, W, A, B, h, None, ctx.scale, (of_x, of_A, of_B))
        return dx, None, None, dA, dB, dc, None


def frozen_linear_stretched(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, c: Tensor, scale: float
) -> Tensor:
    """(1 + c) * (x W^T + scale x A^T B^T) + b, with gradients for x, A, B and c (O,) only; autocast as above."""
    if torch.is_autocast_enabled(x.device.type):
        return _outside_autocast(frozen_linear_stretched, x, W, b, A, B, c, scale)
    result: Tensor = _FrozenLinearStretched.apply(x, W, b, A, B, c, scale)  # type: ignore[no-untyped-call]
    return result


class _FrozenLinearScaled(torch.autograd.Function):
    """As above with the change's fixed factors A and B scaled: h = (x A^T) * d, z = h B^T, y = x W^T + b + s u * z.

    Kept: x A^T and z, and not x.
        g  = s (dy * u) B           (N, R)
        dd = sum_n g * (x A^T)      (R,)
        du = s sum_n dy * z         (O,)
        dx = dy W + (g * d) A       (N, I)
    With noise e, A and d are of 2R: the halves of (x A^T) * d are m and v, and h = m + exp(v / 2) e.  Then exp(v / 2) e
    is kept too, and g has its product with g / 2 as a second half.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        u: Tensor,
        scale: float,
        mask: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        rows, A_cast = with_dropout(x, A, mask)
        a = torch.mm(rows, A_cast.T)
        h, drawn = a * d.to(x.dtype), None
        if noise is not None:
            m, v = h.chunk(2, dim=1)
            drawn = torch.exp(v / 2).mul_(noise)
            h = m + drawn
        z = torch.mm(h, B.to(x.dtype).T)
        y = linear(x, W, b)
        y.view(z.shape).addcmul_(z, u.to(x.dtype), value=scale)
        ctx.save_for_backward(W, A, B, d, u, a, z, mask, drawn)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        W, A, B, d, u, a, z, mask, drawn = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        g = torch.mm(dy_rows, B.to(a.dtype) * (ctx.scale * u).to(a.dtype)[:, None])  # (N, R)
        if drawn is not None:
            g = torch.cat((g, drawn * g / 2), dim=1)  # (N, 2R)
        dd = (g * a).sum(0).to(d.dtype)
        du = (dy_rows * z).sum(0).to(u.dtype) * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            g, A = g.mul_(d.to(a.dtype)), A.to(a.dtype)
            if mask is None or is_of_features(mask):
                dx = times(dy_rows, W).addmm_(g, A if mask is None else A * mask)
            else:
                dx = dropped_(torch.mm(g, A), mask).addmm_(dy_rows, W)
            dx = dx.view(*dy.shape[:-1], -1)
        return dx, None, None, None, None, dd, du, None, None, None


def frozen_linear_scaled(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    u: Tensor,
    scale: float = 1.0,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """x W^T + b + scale u * (((x * mask) A^T * d) B^T), with gradients for x, d (R,) and u (O,) only.

    noise: (N, R), then A is (2R, I) and d (2R,): what B takes is drawn, not computed, as the class says.
    A, B, mask and autocast as in `frozen_linear_low_rank`.
    """
    if torch.is_autocast_enabled(x.device.type):
        return _outside_autocast(frozen_linear_scaled, x, W, b, A, B, d, u, scale, mask, noise)
    result: Tensor = _FrozenLinearScaled.apply(x, W, b, A, B, d, u, scale, mask, noise)  # type: ignore[no-untyped-call]
    return result


def _outside_autocast(run: Callable[..., Tensor], x: Tensor, W: Tensor, b: Tensor | None, *rest: Any) -> Tensor:
    """The same with autocast off, in the dtype that the frozen layer alone would compute in."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return run(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), *rest)


def _forward(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and x A^T (N, R)."""
    y = linear(x, W, b)
    rows, A_cast = with_dropout(x, A, mask)
    h = torch.mm(rows, A_cast.T)
    y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).T, alpha=scale)
    return y, h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, A and B, those that are needed; some methods keep one of the factors as it is.

    x: None where A is fixed and this backward is not itself differentiated.
    """
    dy_rows, rows = dy.reshape(-1, dy.shape[-1]), None
    if x is not None:
        rows, A_cast = with_dropout(x, A, mask)
    else:
        A_cast = A.to(dy.dtype) * mask if is_of_features(mask) else A.to(dy.dtype)
    if rows is not None and h is not None and torch.is_grad_enabled():  # it is; h was outside any graph
        h = torch.mm(rows, A_cast.T)
    B_cast = B.to(dy.dtype)
    if B.shape[1] <= _THIN:  # B^T is laid out anew: this product is up to twice as fast so
        B_cast = B_cast.T.contiguous().T
    g = torch.mm(dy_rows, B_cast).mul_(scale)  # (N, R)
    dx = dA = dB = None
    if needed[1]:
        assert rows is not None
        dA = torch.mm(g.T, rows)
        dA = (dA.mul_(mask) if is_of_features(mask) else dA).to(A.dtype)
    if needed[2]:
        assert h is not None
        dB = torch.mm(h.T, dy_rows).mul_(scale).T.to(B.dtype)  # this way round is the faster one
    if needed[0]:
        if mask is None or is_of_features(mask):
            dx = times(dy_rows, W).addmm_(g, A_cast)
        else:
            dx = dropped_(torch.mm(g, A_cast), mask).addmm_(dy_rows, W)
        dx = dx.view(*dy.shape[:-1], W.shape[1])
    return dx, dA, dB


def with_dropout(x: Tensor, A: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x as rows (N, I) and A (R, I), both in x's dtype, with dropout on one of them."""
    rows, A = x.reshape(-1, x.shape[-1]), A.to(x.dtype)
    if mask is None:
        return rows, A
    if is_of_features(mask):
        return rows, A * mask
    if mask.dtype == torch.int64:
        return rows.flatten().index_fill(0, mask, 0).view(rows.shape), A
    return rows * mask.to(x.dtype), A


def dropped_(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows (N, I) with the entries set to zero that dropout drops, in place."""
    if mask.dtype == torch.int64:
        rows.view(-1).index_fill_(0, mask, 0)
        return rows
    return rows.mul_(mask.to(rows.dtype))


def is_of_features(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.dim() == 1 and mask.dtype != torch.int64
