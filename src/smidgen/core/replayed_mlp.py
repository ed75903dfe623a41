"""ReplayedMLP: a small network beside the model, whose output many layers use, and whose backward computes it again.

What it computed is not kept for backward.  So layers under a reentrant checkpoint, each of which has a backward of its
own, can go through it one after another, where torch would have freed what the first one used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .method import Shared
from .site import Site

Finish = Callable[[Tensor], Tensor]


class ReplayedMLP(Shared):
    """Linear layers with ReLU and dropout between them, of these widths, first and last included."""

    def __init__(self, site: Site, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.ParameterList(site.empty(O, I) for I, O in pairwise(widths))
        self.bias = nn.ParameterList(site.empty(O) for O in widths[1:])

    def reset(self, generator: torch.Generator | None) -> None:
        for weight, bias in zip(self.weight, self.bias, strict=True):  # as torch starts nn.Linear
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(bias, -bound, bound, generator=generator)

    def replayed(self, x: Tensor, finish: Finish) -> Tensor:
        """finish(what the layers make of x), where x has no gradient."""
        rate = self.dropout if self.training else 0.0
        masks = [F.dropout(x.new_ones(*x.shape[:-1], len(bias)), rate) for bias in self.bias[:-1]] if rate else []

        def run() -> Tensor:
            return finish(self._layers(x, masks))

        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return run()
        output: Tensor = _Replayed.apply(run, *self.parameters())  # type: ignore[no-untyped-call]
        return output

    def _layers(self, h: Tensor, masks: Sequence[Tensor]) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            if i:
                h = h.relu() * masks[i - 1] if masks else h.relu()
            h = F.linear(h, weight.to(h.dtype), bias.to(h.dtype))
        return h


class _Replayed(torch.autograd.Function):
    """run().  What it needs again is kept on ctx: what is saved for backward can be used once."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        return run()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            again = ctx.run()
        return None, *torch.autograd.grad(again, ctx.parameters, gradient)


@contextmanager
def without_checkpoints(body: nn.Module) -> Iterator[None]:
    """No gradient checkpointing in a transformers model, where there are no gradients, of which it would warn."""
    on = [m for m in body.modules() if m.__dict__.get("gradient_checkpointing")] if body.training else []
    for module in on:
        module.__dict__["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module in on:
            module.__dict__["gradient_checkpointing"] = True
