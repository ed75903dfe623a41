"""Offload: what the graph keeps of a GPU waits in the host's memory, and is back when the backward asks for it.

    forward    compute   block 0 | block 1 | block 2 ...
               side      out 0   | out 1   | ...              to pinned memory, while the next block computes
    backward   compute             block 2 | block 1 | ...
               side      in 2    | in 1    | in 0             the one before is fetched while this one computes

So two tensors at most are back at once.  Pinned buffers are used again from step to step: allocating them is slow.
"""

import functools
import weakref
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import require

_LEAST_BYTES = 1 << 20  # smaller ones stay: a copy costs more than they do


class Side(Protocol):
    """Copies beside the computing, done in the order in which they were asked for."""

    def buffer(self, like: Tensor) -> Tensor:
        """Memory of the host for a tensor of this shape and dtype."""

    def send(self, tensor: Tensor, buffer: Tensor) -> None:
        """Begin to copy, once what computes the tensor is done."""

    def fetch(self, buffer: Tensor) -> Tensor:
        """Begin to copy to the device; the tensor must not be read before `arrived`."""

    def arrived(self, tensor: Tensor) -> None:
        """Let what is computed from now on wait for a tensor that was fetched."""


class Offloader:
    """Keeps tensors on the host between forward and backward.   side: how they get there."""

    def __init__(self, side: Side, least_bytes: int = _LEAST_BYTES) -> None:
        self.side, self.least_bytes = side, least_bytes
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._last: weakref.ref[_Away] | None = None

    def pack(self, tensor: Tensor) -> "Tensor | _Away":
        """Send a tensor away, if that is worth it: those that need no gradient are the same for all blocks."""
        if not tensor.requires_grad or tensor.nbytes < self.least_bytes:
            return tensor
        unused = self.free[tensor.shape, tensor.dtype]
        buffer = unused.pop() if unused else self.side.buffer(tensor)
        self.side.send(tensor.detach(), buffer)
        sent = _Away(self, buffer, self._last)
        self._last = weakref.ref(sent)
        return sent

    def unpack(self, packed: "Tensor | _Away") -> Tensor:
        """The tensor, back on its device; the one that was sent before it sets out."""
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.fetched()
        packed.back = None  # whoever asked has it now
        before = None if packed.before is None else packed.before()
        if before is not None:
            before.fetched()
        self.side.arrived(tensor)
        return tensor


class _Away:
    """A tensor that is away.   before: the one that was sent before it, which the backward asks for next."""

    def __init__(self, offloader: Offloader, buffer: Tensor, before: "weakref.ref[_Away] | None") -> None:
        self.offloader, self.buffer, self.before = offloader, buffer, before
        self.back: Tensor | None = None

    def fetched(self) -> Tensor:
        if self.back is None:
            self.back = self.offloader.side.fetch(self.buffer)
        return self.back

    def __del__(self) -> None:  # the graph has let go of it; copies are done in order, so the next may use its buffer
        self.offloader.free[self.buffer.shape, self.buffer.dtype].append(self.buffer)


class CudaSide:
    """A stream of its own, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done: dict[int, torch.cuda.Event] = {}

    def buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def send(self, tensor: Tensor, buffer: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not used again before it is copied

    def fetch(self, buffer: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            tensor = buffer.to(self.device, non_blocking=True)
            self.done[id(tensor)] = self.stream.record_event()
        return tensor

    def arrived(self, tensor: Tensor) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.done.pop(id(tensor)))
        tensor.record_stream(current)  # it was made on the other stream


def away(device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, what autograd keeps on a CUDA device goes to the host.   Raises ConfigError on another."""
    refuse_offload(device)
    offloader = _offloader(device)
    return torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack)


def refuse_offload(device: torch.device) -> None:
    """Raise ConfigError where there is no other memory to move to."""
    require(
        device.type == "cuda",
        f'offload="cpu" moves what is kept from a GPU to the memory of the host; this model is on {device.type}. '
        'Leave it out: level "all" alone keeps the inputs of blocks and nothing more',
    )


@functools.cache
def _offloader(device: torch.device) -> Offloader:
    return Offloader(CudaSide(device))
