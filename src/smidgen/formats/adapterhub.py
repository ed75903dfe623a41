"""Stub."""
from pathlib import Path

from .imported import Imported
from .layout import Modules


def is_there(folder: Path) -> bool:
    """No."""
    return False


def read(folder: Path, modules: Modules) -> list[Imported]:
    """No."""
    return []
