"""Site: one place in one model, where an adapter lives: a module, or one parameter of a module."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .layers import ConvKind, LayerKind, MatrixKind, kind_of
from .storage import WeightStorage, master_dtype, storage_of


@dataclass(frozen=True, eq=False)
class Site:
    """One place in one model.

    path: dotted path of the module whose call is wrapped ("" is the model itself).
    parameter: dotted name, from that module, of the parameter to change, for code that reads a weight without calling
        the layer's forward (MultiheadAttention, stacked experts).  None: the call itself is changed.
    kind: what the layer's linear map does; None where the module has none (a whole block, the model).
    """

    path: str
    layer: nn.Module
    parameter: str | None = None
    kind: LayerKind | None = None

    @staticmethod
    def at(path: str, layer: nn.Module, parameter: str | None = None) -> "Site":
        """The site at a module, or at one of its parameters."""
        kind = kind_of(layer)
        if parameter is None or (parameter == "weight" and isinstance(kind, ConvKind)):  # a kernel is no stack
            return Site(path, layer, parameter, kind)
        return Site(path, layer, parameter, MatrixKind(_parameter(layer, parameter).shape))

    @property
    def name(self) -> str:
        """Path and parameter in one dotted name; unique in a model."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}".lstrip(".")

    @property
    def linear(self) -> LayerKind:
        """The layer kind, for methods that act on layers with a linear map."""
        assert self.kind is not None, f"{self.name} has no layer kind"
        return self.kind

    @property
    def fan_in(self) -> int:
        """I of the weight seen as a matrix (O, I)."""
        return self.linear.fans(self.layer)[1]

    @property
    def fan_out(self) -> int:
        """O of the weight seen as a matrix (O, I)."""
        return self.linear.fans(self.layer)[0]

    @property
    def stored(self) -> Tensor:
        """The parameter as it is held: the layer's weight, or the parameter that is the site."""
        return _parameter(self.layer, self.parameter or "weight")

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if the site is a layer that has one."""
        return None if self.parameter else cast("Tensor | None", getattr(self.layer, "bias", None))

    @property
    def storage(self) -> WeightStorage:
        """How the weight is held."""
        return storage_of(self.stored)

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """The weight as a matrix (O, I), or rows of it, in its own dtype; a view where possible."""
        return self.linear.read_rows(self.storage.read(self.stored), rows)

    def weight_blocks(self) -> Iterator[Tensor]:
        """The weight as a matrix (O, I): whole, or, where it is held in few bits, some rows after the others."""
        return (self.linear.read_rows(W, slice(None)) for W in self.storage.blocks(self.stored))

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised trainable parameter for this site: on its device, in fp32 or better."""
        like = self._followed()
        if like is None:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32))
        return nn.Parameter(torch.empty(shape, dtype=master_dtype(like), device=like.device))

    @property
    def device(self) -> torch.device:
        """Where the numbers of an adapter here are; on the CPU while the base has no memory."""
        like = self._followed()
        return torch.device("cpu") if like is None or like.is_meta else like.device

    def _followed(self) -> Tensor | None:
        """The tensor of the base whose device and dtype an adapter here follows."""
        return next(self.layer.parameters(), None) if self.kind is None else self.stored

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """x by A (R, I), the layer's own way; A is cast to x's dtype, never x to A's."""
        return self.linear.project(self.layer, x, _like(A, x))

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        """R channels by B (O, R) to the layer's output channels."""
        return self.linear.expand(self.layer, h, _like(B, h))

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        """What the layer gives for x with M (O, I) as its weight, without bias; for an embedding in M's dtype."""
        return self.linear.apply(self.layer, x, _like(M, x))

    def channels(self, v: Tensor, like: Tensor) -> Tensor:
        """v, a number per channel, in the dtype of `like` and shaped to broadcast against it."""
        return self.linear.channels(self.layer, _like(v, like), like)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the frozen layer computes in for this input: autocast's where it is on, x's own elsewhere."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return x.dtype


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(x.dtype) if x.is_floating_point() else parameter


def _parameter(layer: nn.Module, dotted: str) -> Tensor:
    owner, _, name = dotted.rpartition(".")
    return cast(Tensor, getattr(layer.get_submodule(owner), name))
