"""A folder of things that took long to make, each under a key of all that it follows from.

    FOLDER/KEY/         the files, with `files.json`: their sizes and sha256, checked whenever it is used
    FOLDER/.lock-0 ...  held by the process that makes one, so that others wait and then find it

An entry is whole or not there (`core/files.py`); a damaged one is made anew.  Together they take at most `most_bytes`:
those that were used longest ago go first.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smidgen.core.errors import FolderError
from smidgen.core.files import atomic_directory, remove_directory, sha256_file
from smidgen.core.safe import read_json

try:
    import fcntl
except ImportError:  # Windows: two processes make it both, and one of them stays
    fcntl = None  # type: ignore[assignment]

MOST_BYTES = 5 << 30
_LIST = "files.json"
State = Literal["found", "made", "mended"]  # mended: what was there was damaged


def default_folder() -> Path:
    """`$SMIDGEN_CACHE`, else smidgen's part of the user's cache folder."""
    said, cache = os.environ.get("SMIDGEN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(said).expanduser() if said else (Path(cache) if cache else Path.home() / ".cache") / "smidgen"


@dataclass(frozen=True)
class Cache:
    """Entries in a folder.   most_bytes: of all of them; the one that was made last stays, whatever it takes."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def entry(self, key: str, fill: Callable[[Path], None]) -> tuple[Path, State]:
        """The folder of an entry, and whether it was there.   key: hexadecimal digits.   fill: writes its files.

        Raises OSError if nothing can be written.
        """
        path = self.folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".lock-{key[0]}"):
            state: State = "made"
            if path.exists():
                if _is_whole(path):
                    os.utime(path)
                    return path, "found"
                state = "mended"
            with atomic_directory(path, replace=True) as new:
                fill(new)
                files = {file.name: [file.stat().st_size, sha256_file(file)] for file in sorted(new.iterdir())}
                (new / _LIST).write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
            self._make_room(path)
        return path, state

    def _make_room(self, newest: Path) -> None:
        entries = [entry for entry in self.folder.iterdir() if entry.is_dir() and entry.name != newest.name]
        room = self.most_bytes - _size(newest)
        for entry in sorted(entries, key=_used_at, reverse=True):
            room -= _size(entry)
            if room < 0:
                with contextlib.suppress(OSError):  # in use, on Windows; or another process was faster
                    remove_directory(entry)


def _is_whole(path: Path) -> bool:
    """True if all files are there as they were written."""
    try:
        said = read_json(path / _LIST)
        files = said["files"] if said["format"] == 1 else {}
        return bool(files) and all(
            [(path / name).stat().st_size, sha256_file(path / name)] == [size, sha256]
            for name, (size, sha256) in files.items()
        )
    except (FolderError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def _used_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; where the disk has no locks, nobody waits."""
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file lets go of it
