"""LoRA+: groups of parameters in which B learns faster than A.  Hayou et al. 2024, arXiv:2402.12354, section 4.

    A and all else    learning rate                     decays where it is a matrix
    B                 learning rate * ratio             decays where it is a matrix
    an embedding's    a learning rate of its own        decays

The split, and the defaults of 16 and 1e-6, are the authors' code's.  A method says in `faster` which tensors are B.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .adapter import Adapter
from .errors import require
from .layers import EmbeddingKind


def groups(
    parts: Iterable[tuple[Adapter, Sequence[str]]],
    learning_rate: float,
    weight_decay: float,
    ratio: float,
    embedding_learning_rate: float,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, empty ones left out.

    parts: each adapter with the names of its tensors that learn faster; of a head that is trained whole, none.
    Raises ConfigError if the numbers cannot be, or nothing learns faster.
    """
    finite = math.isfinite(ratio) and ratio > 0
    require(finite, f"ratio is {ratio}; B learns that many times faster than A, so it is a number above 0")
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    some = False
    for part, faster in parts:
        for name, parameter in part.named_parameters():
            rate, decay = learning_rate, weight_decay if parameter.ndim > 1 else 0.0
            if name in faster:
                rate, some = learning_rate * ratio, True
            if faster and isinstance(part.site.kind, EmbeddingKind):
                rate = embedding_learning_rate
            if parameter.requires_grad:
                found.setdefault((rate, decay), []).append(parameter)
    require(some, "no parameter is a B, which LoRA+ lets learn faster: take it for LoRA and what is like it")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in found.items()]
