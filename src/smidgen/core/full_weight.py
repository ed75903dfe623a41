"""FullWeightAdapter: for methods whose change of a weight has no thin form; a method says `weight_delta` and no more.

    y' = x (W + D)^T + b            D: (O, I), made of few parameters

D is made when it is needed and not kept: on a frozen linear layer of 32 bits or more the forward is one product with
W + D, and the backward makes D again.

    dx = dy (W + D)       (N, I)          dD = dy^T x       (O, I), from which the parameters' gradients follow

In 16 bits W + D would round D away, so x D^T is added to the layer's own output.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import AdditiveAdapter, Call
from .low_rank import is_bare_linear, is_frozen

_WHOLE = slice(None)


class FullWeightAdapter(AdditiveAdapter):
    """A subclass has its parameters and `weight_delta(rows)`, differentiable, in fp32 or better."""

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if wide and self.site.storage.plain and is_bare_linear(call) and is_frozen(self.site):
            W, b = self.site.stored, self.site.bias
            if W.dtype == x.dtype:
                return _linear(x, W, b, lambda: self.weight_delta(_WHOLE), self._learned())
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        return self.site.apply(x, self.weight_delta(_WHOLE))

    def weight_delta(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def _learned(self) -> list[Tensor]:
        """What D is made of and is trained: also what several sites share."""
        found = list(self.parameters())
        shared = self.__dict__.get("shared")  # of another site, which holds it
        if shared is not None:
            found += list(shared.parameters())
        return [parameter for parameter in found if parameter.requires_grad]


def _linear(x: Tensor, W: Tensor, b: Tensor | None, change: Callable[[], Tensor], learned: list[Tensor]) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
        return F.linear(x, W + change().to(W.dtype), b)
    result: Tensor = _FrozenLinearPlus.apply(x, W, b, change, *learned)  # type: ignore[no-untyped-call]
    return result


class _FrozenLinearPlus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, change: Callable[[], Tensor], *learned: Tensor
    ) -> Any:
        ctx.save_for_backward(x, W, *learned)
        ctx.change = change
        return F.linear(x, W + change().to(W.dtype), b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, *learned = ctx.saved_tensors
        dy_rows = dy.reshape(-1, dy.shape[-1])
        with torch.enable_grad():
            D = ctx.change()
        dx = torch.mm(dy_rows, W + D.detach().to(W.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        gradients: tuple[Any, ...] = ()
        if learned:
            dD = torch.mm(dy_rows.T, x.reshape(-1, x.shape[-1])).to(D.dtype)
            gradients = torch.autograd.grad(D, learned, dD, allow_unused=True)
        return dx, None, None, None, *gradients
