"""The backward pass of scaled dot-product attention in bfloat16 on a processor: in fp32 where the rows are short.

PyTorch's kernel works in blocks that rows of up to some hundred tokens do not fill: with 12 heads of 32 features and 32
rows of 32 tokens it needs 21 ms, and its fp32 twin 5, casts included 6 (`benchmarks/attention.py`).  In an encoder of
MiniLM's shape that was a third of a training step.  The gradients are those of the same formula, rounded once less.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LONGEST = 256  # tokens; with more the bfloat16 kernel is the faster one
_NAME = "_scaled_dot_product_flash_attention_for_cpu_backward"
_is_on = False


@contextmanager
def short_attention_backward_in_fp32() -> Iterator[None]:
    """While the context lasts, attention over at most `LONGEST` tokens has its backward pass computed in fp32, where it
    ran in bfloat16 on a CPU.  What is kept between forward and backward stays the same.
    """
    global _is_on
    _register()
    before, _is_on = _is_on, True
    try:
        yield
    finally:
        _is_on = before


@functools.cache
def _register() -> Any:
    """The library that puts `_backward` in the operator's place, for as long as somebody holds it."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl(_NAME, _backward, "AutogradCPU")
    return library


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, *rest: Any, **others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv.   dy, q, k, v, y: (N, H, L, D)   sums: (N, H, L), logarithms, in fp32."""
    kernel: Any = getattr(torch.ops.aten, _NAME)
    with torch._C._AutoDispatchBelowAutograd():
        if not (_is_on and q.dtype == torch.bfloat16 and max(q.shape[-2], k.shape[-2]) <= LONGEST):
            found: tuple[Tensor, Tensor, Tensor] = kernel(dy, q, k, v, y, sums, *rest, **others)
            return found
        mask = others.pop("attn_mask", None)
        wide = [tensor.float() for tensor in (dy, q, k, v, y)]
        dq, dk, dv = kernel(*wide, sums, *rest, attn_mask=None if mask is None else mask.float(), **others)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
