"""What a model is, for comparing it before and after."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.core.adapter import HELD

OURS = {HELD, "_smidgen_set", "_smidgen_plan", "_smidgen_values"}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State of the base, in order; the tensors themselves."""
    state = model.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in state.items() if HELD not in key.split(".")}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if HELD not in path.split(".")}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the module has, its tensors and parts by identity."""
    own = {name: value for name, value in module.__dict__.items() if name not in OURS}
    for table in ("_parameters", "_buffers", "_modules"):
        own[table] = [(name, id(value)) for name, value in module.__dict__[table].items() if name != HELD]
    return own


def everything(model: nn.Module) -> dict[str, Any]:
    """All that detaching has to give back, bit for bit."""
    return {
        "modules": [(path, id(module), type(module)) for path, module in model.named_modules()],
        "tensors": [(key, id(t), t.detach().clone()) for key, t in model.state_dict(keep_vars=True).items()],
        "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "attributes": [copy.copy(attributes(module)) for module in model.modules()],
        "names": [list(module.__dict__) for module in model.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)
