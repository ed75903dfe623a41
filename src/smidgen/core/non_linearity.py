"""The non-linear functions that small networks may have between their layers, by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NonLinearity = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "leaky_relu", "mish"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
}
