"""How much memory this process may still take."""

import re
from pathlib import Path

import torch

_AVAILABLE, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take: of the device, or of the machine or its container; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", _AVAILABLE.read_text())
    except OSError:
        return None
    free = int(found[1]) * 1024 if found else None
    try:  # where a container has less than the machine
        most, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    if most == "max" or free is None:
        return free
    return max(0, min(free, int(most) - int(used)))
