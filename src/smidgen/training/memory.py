"""Memory: what a stretch of work takes at most, what a graph keeps for backward, and running out of it.

Of the process on a CPU, of the allocator on a CUDA device.
"""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.errors import OutOfMemory
from ..core.recompute import kept_bytes

T = TypeVar("T")

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# of allocators that have no exception of their own
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Peak:
    """Filled when the stretch ends.   size_bytes: None where the system does not tell."""

    size_bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory while the context lasts: resident memory of the process, or a CUDA
    device's allocations.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.size_bytes = torch.cuda.max_memory_allocated(device)
        return
    resettable = _reset()
    yield peak
    if resettable:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        peak.size_bytes = int(found[1]) * 1024 if found else None


def _reset() -> bool:
    """Forget the process's peak so far; Linux alone can."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a strided tensor's numbers are; in few bits it may be made of others, and have none itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))


def kept_for_backward(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps after `run`, parameters and buffers not counted; with what recomputing blocks keep.

    Every storage counts once, whole, however many saved tensors are views of it.
    """
    weights = {s.data_ptr() for t in (*model.parameters(), *model.buffers()) for s in _storages(t)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:  # a sparse one: its numbers and their places
            whole = tensor.coalesce()
            kept[id(tensor)] = whole.values().nbytes + whole.indices().nbytes
        else:
            kept.update({s.data_ptr(): s.nbytes() for s in _storages(tensor) if s.data_ptr() not in weights})
        return tensor.detach()  # the graph holds it, so no address is used twice; itself, it would hold the graph

    before = kept_bytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()
    recorded = kept_bytes() - before
    del graph
    return sum(kept.values()) + recorded


def is_out_of_memory(error: BaseException) -> bool:
    """True if this error says that an allocation failed, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def fitting(run: Callable[[int], T], batch: int, split: int, *, alone: bool = True) -> tuple[T, int]:
    """run(split), with every batch in twice as many parts as often as memory asks; what it gave, and the parts.

    alone: False where other processes would wait for ever for one that starts again.
    Raises OutOfMemory if a single row does not fit, or if another process waits.
    """
    while True:
        try:
            return run(split), split
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        gc.collect()  # out here, where nothing holds what the failed step had made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = rows_at_once(batch, split)
        if rows == 1 or not alone:
            advice = "Shorten the rows, say train.recompute: all, or take a smaller model or model.dtype: bfloat16"
            raise OutOfMemory(
                f"{rows} row{'s' * (rows > 1)} at a time do not fit in memory ({said}). "
                + (advice if alone else "With several processes the batch is not cut by itself: lower train.batch")
            )
        split *= 2


def rows_at_once(batch: int, split: int) -> int:
    """How many rows are in memory at once, where a batch is run in so many parts."""
    return max(1, -(-batch // split))
