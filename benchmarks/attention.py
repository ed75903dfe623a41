"""Attention in bfloat16 on a processor, forward and backward: PyTorch's backward pass, and ours in fp32 for short rows.

As `smidgen tune` runs it (`core/attention_backward.py`); beyond 256 tokens ours is PyTorch's. The shapes are those of
batches of encoders and of one of a decoder, with a mask of padding; "math" is PyTorch's attention written out, which
keeps the attention of all pairs for backward.

    python benchmarks/attention.py [--rounds 7]
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from common import cpu_seconds, described, interleaved, one_thread, over, save
from torch.nn.attention import SDPBackend, sdpa_kernel

from smidgen.core.attention_backward import short_attention_backward_in_fp32

USUAL, MATH, OURS = "PyTorch", "PyTorch, math", "**smidgen**"
SHAPES = (  # rows, heads, tokens, features of a head
    (32, 12, 16, 32),
    (32, 12, 32, 32),
    (32, 12, 64, 32),
    (16, 12, 128, 32),
    (8, 12, 256, 32),
    (32, 12, 32, 64),
    (8, 12, 128, 64),
    (4, 12, 256, 64),
    (4, 8, 128, 128),
    (2, 16, 512, 64),
)


def step_of(shape: tuple[int, int, int, int], context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    rows, heads, tokens, features = shape
    q, k, v = (torch.randn(rows, tokens, heads, features, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sees = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    sees[::2, :, :, -2:] = False

    def step() -> None:
        with context():
            y = F.scaled_dot_product_attention(*inputs, attn_mask=sees)
            torch.autograd.grad(y, inputs, y.detach())

    return step


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=7)
    asked = arguments.parse_args()
    one_thread()
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        USUAL: nullcontext,
        MATH: lambda: sdpa_kernel(SDPBackend.MATH),
        OURS: short_attention_backward_in_fp32,
    }
    rows = []
    for shape in SHAPES:
        steps = {name: step_of(shape, context) for name, context in contexts.items()}
        seconds = interleaved(steps, asked.rounds, cpu_seconds)
        found = over(seconds, USUAL)
        line = "{} rows, {} heads, {} tokens, {} features".format(*shape)
        print(f"{line:45s} math {found[MATH].median:.2f}  ours {found[OURS].median:.2f}", flush=True)
        rows.append([line, 1e3 * sorted(seconds[USUAL])[asked.rounds // 2], found[MATH], found[OURS]])
    columns = ["", f"{USUAL}, CPU ms", f"{MATH} / {USUAL}", f"{OURS} / {USUAL}"]
    title = "forward and backward, bfloat16, one thread"
    table = {"title": title, "columns": columns, "rows": rows, "plot": [columns[2:]]}
    save("attention", "Attention of short rows", described(__doc__), [table], [])


if __name__ == "__main__":
    main()
