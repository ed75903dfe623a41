"""How much memory is free: of the machine, or of its container."""

import torch

from smidgen.core import free_memory as module
from smidgen.core.free_memory import free_memory


def test_the_smaller_of_machine_and_container_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_AVAILABLE", tmp_path / "meminfo")
    monkeypatch.setattr(module, "_GROUP", tmp_path)
    cpu = torch.device("cpu")
    assert free_memory(cpu) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_memory(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert free_memory(cpu) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu) == 5000 * 1024
