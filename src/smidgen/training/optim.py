"""Optimisers: AdamW, in fp32 or with its two states in 8 bit.

    adamw      12 bytes per trained parameter beside its 4: gradient, mean and variance
    adamw8bit   6 bytes: mean and variance in 8 bit, block by block of 256 (Dettmers et al. 2021, arXiv:2110.02861);
                tensors below 4,096 entries stay in fp32

An adapter has few parameters, so the second saves megabytes there; it is for `selective`, `osf`, large ranks and all
parameters.  Optimisers of another kind are not offered: the presets' learning rates are AdamW's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import nn

from ..core.errors import MissingDependency

Optimizer = Literal["adamw", "adamw8bit"]
STATE_BYTES: dict[Optimizer, int] = {"adamw": 8, "adamw8bit": 2}  # per trained parameter


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a learning rate; matrices decay, vectors do not."""

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    weight_decay: float


def optimizer_of(groups: Sequence[Group], name: Optimizer = "adamw") -> torch.optim.Optimizer:
    """The optimiser of these groups, each in two: what decays and what does not.   Raises MissingDependency."""
    tensors = []
    for group in groups:
        for decays in (True, False):
            some = [p for p in group.parameters.values() if (p.ndim > 1) == decays]
            if some:
                decay = group.weight_decay if decays else 0.0
                tensors.append({"params": some, "lr": group.learning_rate, "weight_decay": decay})
    return optimizer_class(name)(tensors)


def optimizer_class(name: Optimizer) -> Callable[..., torch.optim.Optimizer]:
    """What makes it of parameter groups.   Raises MissingDependency."""
    if name == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # its states are plain tensors, so checkpoints hold them to the bit
    except ImportError as error:
        raise MissingDependency(
            'train.optimizer: adamw8bit needs bitsandbytes: pip install "smidgen[8bit]". It saves 6 bytes per trained '
            "parameter; for an adapter, whose parameters are few, leave it out"
        ) from error
    return cast(Callable[..., torch.optim.Optimizer], AdamW8bit)
