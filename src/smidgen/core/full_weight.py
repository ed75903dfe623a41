"""FullWeightAdapter: for methods whose change of a weight has no thin form; a method says `weight_delta` and no more.

    y' = x (W + D)^T + b            D: (O, I), made of few parameters

D is made when it is needed and not kept: on a frozen linear layer of 32 bits or more the forward is one product with
W + D, and the backward makes D again.

    dx = dy (W + D)       (N, I)          dD = dy^T x       (O, I), from which the parameters' gradients follow

In 16 bits W + D would round D away, so x D^T is added to the layer's own output, D being made twice as well.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import AdditiveAdapter, Call
from .layers import LinearKind
from .low_rank import is_bare_linear, is_frozen, takes_change, with_change
from .products import linear, times
from .site import compute_dtype

_WHOLE = slice(None)
Gradients = Mapping[Tensor, Tensor]  # of each parameter the gradient so far, to be added to in place
Pullback = Callable[[Tensor, Gradients], None]


class FullWeightAdapter(AdditiveAdapter):
    """A subclass has its parameters and `weight_delta(rows)`, differentiable, in fp32 or better."""

    blockwise: ClassVar[bool] = False  # `changed` is written by hand

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if wide and self.site.storage.plain and is_bare_linear(call) and is_frozen(self.site):
            W, b = self.site.stored, self.site.bias
            if W.dtype == x.dtype:
                return self._linear(x, W, b)
        if takes_change(self.site, call, x):
            return with_change(self.site, x, self.weight_delta(_WHOLE))
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not isinstance(self.site.kind, LinearKind):
            return self.site.apply(x, self.weight_delta(_WHOLE))
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._linear(x)
        x = x.to(compute_dtype(x))
        with torch.autocast(device, enabled=False):
            return self._linear(x)

    def weight_delta(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        """These rows of W + D, or of D, and what takes their gradient to those of the parameters.

        W: (rows, I), left as it is.   For linear layers.   Written by hand where that costs less than autograd; the
        class then says `blockwise`, and is asked for some rows after the others, which stay in the cache.
        """
        learned = self.trained_tensors()
        with torch.enable_grad():
            D = self.weight_delta(rows)

        def back(dD: Tensor, gradients: Gradients) -> None:
            for parameter, gradient in zip(
                learned, torch.autograd.grad(D, learned, dD, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    gradients[parameter].add_(gradient)

        return D.detach() if W is None else W + D.detach(), back

    def pull(self, back: Pullback, dy: Tensor, x: Tensor, dtype: torch.dtype, gradients: Gradients) -> None:
        """Add to the gradients what follows from dD = dy^T x, in this dtype, by the `back` of `changed`.

        dy: (N, rows)   x: (N, I).   Written by hand where it can be had for less than dD.
        """
        back(torch.mm(dy.T, x).to(dtype), gradients)

    def _linear(self, x: Tensor, W: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """x (W + D)^T + b, or x D^T; nothing of the size of D is kept."""
        by_hand = type(self).changed is not FullWeightAdapter.changed  # then rounded alike with and without gradients
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or by_hand):
            D = self.weight_delta(_WHOLE).to(x.dtype)  # a compiler decides itself what to keep
            return F.linear(x, D if W is None else W + D, b)
        result: Tensor = _LinearOfChange.apply(x, W, b, self, *self.trained_tensors())  # type: ignore[no-untyped-call]
        return result


class _LinearOfChange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, adapter: FullWeightAdapter, *learned: Tensor
    ) -> Any:
        ctx.save_for_backward(x, W, *learned)
        ctx.adapter, ctx.learned, ctx.blocks = adapter, learned, _blocks(adapter, x)
        if len(ctx.blocks) == 1:
            return linear(x, adapter.changed(W, _WHOLE)[0].to(x.dtype), b)
        y = x.new_empty(*x.shape[:-1], adapter.site.fan_out)
        x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for rows in ctx.blocks:
            V, _ = adapter.changed(_of(W, rows), rows)
            torch.mm(x_rows, V.T, out=y_rows[:, rows])
        return y if b is None else y.add_(b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.autocast(dy.device.type, enabled=False):  # as the forward was
            return _LinearOfChange._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> Any:
        x, W, *_ = ctx.saved_tensors  # and looked whether the parameters have changed since
        adapter: FullWeightAdapter = ctx.adapter
        x_rows, dy_rows, dx = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), None
        # by those of the forward, not the saved ones: checkpointing hands back copies
        gradients = {p: torch.zeros_like(p) for p in (*adapter.parameters(), *ctx.learned)} if ctx.learned else {}
        for rows in ctx.blocks:
            V, back = adapter.changed(_of(W, rows), rows)
            if ctx.needs_input_grad[0]:
                part = V.to(x.dtype)
                dx = times(dy_rows[:, rows], part) if dx is None else dx.addmm_(dy_rows[:, rows], part)
            if gradients:
                adapter.pull(back, dy_rows[:, rows], x_rows, V.dtype, gradients)
        return None if dx is None else dx.view(x.shape), None, None, None, *(gradients[p] for p in ctx.learned)


def _of(W: Tensor | None, rows: slice) -> Tensor | None:
    return None if W is None else W[rows]


def _blocks(adapter: FullWeightAdapter, x: Tensor) -> list[slice]:
    """The rows of D that are made at once."""
    O, I = adapter.site.fan_out, adapter.site.fan_in
    if not adapter.blockwise or x.element_size() < 4:  # 16 bits: sums over blocks would be rounded after each
        return [_WHOLE]
    size = max(128, (2**16 if x.device.type == "cpu" else 2**24) // I)
    return [slice(start, min(start + size, O)) for start in range(0, O, size)]
