"""Peak memory of a stretch of work: of the process on a CPU, of the allocator on a CUDA device."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
