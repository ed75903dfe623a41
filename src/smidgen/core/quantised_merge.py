"""Merging where weights are held in few bits: into the same format, or into plain layers.

Into the same format the merged weight is quantised anew, block by block.  Most updates are smaller than the format's
steps, and would be lost; how much of each is measured like any other rounding.  Into plain layers nothing is lost but
what their dtype rounds.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import attach as mechanism
from .quantised import Pieces
from .quantised_linear import QuantisedLinear
from .storage import Bits4Storage, OpaqueStorage, TorchaoStorage, storage_of
from .targets import modules_of

Blocks = Iterator[tuple[slice, Tensor, Tensor | None]]  # rows, new, new bias


@torch.no_grad()
def requantised(layer: QuantisedLinear, blocks: Callable[[], Blocks]) -> tuple[Pieces, float]:
    """The pieces of the merged weight, and norm(rounding) / norm(update); infinite if a value is not finite."""
    shape = (layer.out_features, layer.in_features)
    pieces = layer.format.quantised(shape, ((rows, new) for rows, new, _ in blocks()), layer.packed.device)
    read, lost, update = layer.format.reader(shape, pieces), 0.0, 0.0
    for rows, new, b in blocks():
        if not torch.isfinite(new).all() or (b is not None and not torch.isfinite(b.to(layer.bias.dtype)).all()):
            return pieces, float("inf")
        lost += float(torch.linalg.vector_norm(read(rows, slice(None)) - new)) ** 2
        update += float(torch.linalg.vector_norm(new - layer.dense(rows).to(new.dtype))) ** 2
    return pieces, (lost / update) ** 0.5 if update else 0.0


@contextmanager
def made_dense(model: nn.Module, dtype: torch.dtype | None) -> Iterator[list[str]]:
    """All layers of the model that hold their weight in few bits as plain nn.Linear; as they were if the block raises.

    dtype: of the layers; by default what their weight is read in.   Yields their paths.
    """
    before: list[tuple[nn.Module, Any, dict[str, Any]]] = []
    paths = []
    try:
        for path, layer in modules_of(model):
            W = _numbers(layer)
            if W is not None:
                own = {name: dict(value) if type(value) is dict else value for name, value in layer.__dict__.items()}
                before.append((layer, layer.__class__, own))
                paths.append(path)
                _make_dense(layer, W.to(dtype or W.dtype))
        yield paths
    except BaseException:
        for layer, kind, state in before:
            layer.__dict__.clear()
            layer.__dict__.update(state)
            layer.__class__ = kind
        raise


@torch.no_grad()
def _numbers(layer: nn.Module) -> Tensor | None:
    """The dense weight of a linear layer that holds it otherwise; None for any other layer."""
    if isinstance(layer, QuantisedLinear):
        return layer.dense(slice(None))
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or weight is None:
        return None
    storage = storage_of(weight)
    if isinstance(storage, Bits4Storage | TorchaoStorage):
        return storage.read(weight)
    return _bits_8(layer, weight) if isinstance(storage, OpaqueStorage) else None


def _bits_8(layer: nn.Module, weight: Any) -> Tensor | None:
    """What bitsandbytes' Linear8bitLt holds: whole numbers, and the largest of each row; after a call in its state."""
    library = sys.modules.get("bitsandbytes.nn")
    if library is None or not isinstance(layer, library.Linear8bitLt):
        return None
    state = cast(Any, layer).state
    whole = weight.data if state.CB is None else state.CB
    largest = weight.SCB if state.SCB is None else state.SCB
    if largest is None:  # it quantises when it is moved to a device
        return cast(Tensor, weight.data)
    dtype = torch.float16 if layer.bias is None else cast(Tensor, layer.bias).dtype
    return cast(Tensor, (whole * (largest / 127)[:, None]).to(dtype))


def _make_dense(layer: nn.Module, W: Tensor) -> None:
    """Make a linear layer, the same object, with adapters or without, a plain one with this weight."""
    rest = {name: value for name, value in layer._parameters.items() if name != "weight"}
    for bias in rest.values():
        if bias is not None:
            rest["bias"] = nn.Parameter(bias.detach().to(W.dtype), requires_grad=bias.requires_grad)
    layer._parameters.clear()
    layer._parameters.update({"weight": nn.Parameter(W, requires_grad=False), **rest})  # in nn.Linear's order
    if isinstance(layer, QuantisedLinear):
        layer._buffers.clear()
    for name in ("format_name", "weight_dtype", "quant_state", "state"):  # ours, bitsandbytes'
        layer.__dict__.pop(name, None)
    layer.__class__ = mechanism.adapted(nn.Linear) if mechanism.is_adapted(layer) else nn.Linear
