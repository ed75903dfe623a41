"""WeightStorage: how a weight is held, so that reading and merging mean the same on every backend.

Running an adapter never needs this; merging, weight-informed starts and the fused kernel do.  One class per backend,
tried in order; a backend is recognised without importing its library.
"""

import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import MergeError


class WeightStorage:
    """How one parameter of a layer is read and written."""

    name: str
    plain: bool = False  # an ordinary floating-point tensor that a kernel may multiply by
    readable: bool = True  # `read` gives its numbers

    def matches(self, weight: Tensor) -> bool:
        """True if `weight` is held this way."""
        raise NotImplementedError

    def read(self, weight: Tensor) -> Tensor:
        """The weight in its logical shape, of floating-point numbers; the tensor itself where it is one.

        Of a weight in few bits `read(weight)[rows]` may make these rows dense alone.
        """
        raise NotImplementedError

    def blocks(self, weight: Tensor) -> Iterator[Tensor]:
        """The same for who needs no more than some rows at once: whole if it is there anyway."""
        yield self.read(weight)

    def writable(self, weight: Tensor) -> Tensor:
        """The tensor to write merged rows into.  Raises MergeError if this backend cannot be written."""
        raise MergeError(
            f"a weight held as {self.name} cannot be merged into: keep the adapter attached, or make plain "
            'layers of all that are held in few bits: merge(into="dense")'
        )


class DenseStorage(WeightStorage):
    """A plain floating-point tensor; writing rounds once to its dtype."""

    name = "dense"
    plain = True

    def matches(self, weight: Tensor) -> bool:
        return type(weight) in (Tensor, nn.Parameter) and weight.dtype.is_floating_point

    def read(self, weight: Tensor) -> Tensor:
        return weight.detach()

    def writable(self, weight: Tensor) -> Tensor:
        return weight.detach()


class ShardedStorage(WeightStorage):
    """A plain tensor spread over several processes by FSDP2: whole while its layer runs, gathered where it is read.

    Every process has to read it, and none can be written to.
    """

    name = "shards of several processes"
    plain = True  # while the layer runs

    def matches(self, weight: Tensor) -> bool:
        return hasattr(weight, "full_tensor") and weight.is_floating_point()

    def read(self, weight: Tensor) -> Tensor:
        gathered: Tensor = weight.full_tensor()  # type: ignore[attr-defined]
        return gathered.detach()


class Bits4Storage(WeightStorage):
    """bitsandbytes' NF4 and FP4, as its Linear4bit holds them."""

    name = "bitsandbytes 4-bit"

    def matches(self, weight: Tensor) -> bool:
        library = sys.modules.get("bitsandbytes.nn")  # not imported only to be asked about
        return library is not None and isinstance(weight, library.Params4bit)

    def read(self, weight: Tensor) -> Tensor:
        state = cast(Any, weight).quant_state
        if state is None:  # it quantises when it is moved to a device
            return weight.data
        dequantise = sys.modules["bitsandbytes.functional"].dequantize_4bit
        return cast(Tensor, dequantise(weight.data, state)).detach()


class TorchaoStorage(WeightStorage):
    """torchao's tensor subclasses."""

    name = "torchao"

    def matches(self, weight: Tensor) -> bool:
        return type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize")

    def read(self, weight: Tensor) -> Tensor:
        return weight.detach().dequantize()


class OpaqueStorage(WeightStorage):
    """Anything else that a layer can multiply by (quantised, a tensor subclass): runs, is neither read nor merged."""

    name = "opaque"
    readable = False

    def matches(self, weight: Tensor) -> bool:
        return True

    def read(self, weight: Tensor) -> Tensor:
        raise MergeError(
            f"a weight held as {type(weight).__name__} of {weight.dtype} cannot be read as numbers here: "
            "keep the adapter attached, or load the base unquantised to merge"
        )


_STORAGES: list[WeightStorage] = [DenseStorage(), ShardedStorage(), Bits4Storage(), TorchaoStorage(), OpaqueStorage()]


def storage_of(weight: Tensor) -> WeightStorage:
    """The backend that holds `weight`."""
    return next(storage for storage in _STORAGES if storage.matches(weight))


def register_storage(storage: WeightStorage) -> None:
    """Teach smidgen a backend; the newest is asked first."""
    _STORAGES.insert(0, storage)


def master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype adapters keep on this weight: fp32 on 16-bit and quantised weights, fp64 on fp64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
