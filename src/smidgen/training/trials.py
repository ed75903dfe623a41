"""Trials before a run leave nothing behind."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..core.adapter import HELD


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """What trials draw and what statistics they leave in adapters is as before when the context ends."""
    statistics = {name: b for name, b in model.named_buffers() if HELD in name.split(".")}
    before = {name: b.detach().clone() for name, b in statistics.items()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in statistics.items():
                buffer.copy_(before[name])


@contextmanager
def as_if_trained(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While the context lasts these parameters of the model, and no others, require a gradient."""
    before, trained = [(p, p.requires_grad) for p in model.parameters()], {id(p) for p in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained and parameter.is_floating_point())
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
