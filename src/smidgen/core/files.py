"""Write files and directories so that a reader finds the old or the new, whole, whatever moment the writer is killed.

    write a hidden sibling  ->  fsync each file  ->  rename into place  ->  fsync the parent directory

A directory that is there already is exchanged with the new one in a single step (Linux: renameat2 with
RENAME_EXCHANGE). Where the system or the disk cannot do that, the old one is first renamed aside; `recover` puts it
back if the writer was killed between its two renames. Siblings left by killed writers are removed at the next write
into the same parent: a writer holds a lock (flock) on its sibling, so one that can be locked has no owner, even if a
process with its id lives on.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: siblings of killed writers stay until someone deletes them
    fcntl = None  # type: ignore[assignment]

# Being written, or on its way out.
_NEW = re.compile(r"\.smidgen-new-[0-9a-f]{16}")
# Renamed aside; goes back to `name` if that is missing.
_OLD = re.compile(r"\.smidgen-old-[0-9a-f]{16}-(?P<name>.+)", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, replace: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes `path` when the block ends, or vanishes if the block raises.

    With `replace`, everything that is at `path` goes at that moment, files of others too: look before you replace.
    Raises FileExistsError if `path` holds something and `replace` is not set; OSError if fewer than `needed_bytes` are
    free, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    _prepare(path, needed_bytes)
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise _taken(path)
    new, lock = _locked_sibling(path, directory=True)
    try:
        with _explain_no_room(path):
            yield new
            _sync_tree(new)
        _move_into_place(new, path, replace)
        _sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # what failed, or what was replaced; nothing if it was a plain rename
        os.close(lock)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write one file, replacing what is there. Raises OSError if the disk is full."""
    path = Path(os.path.realpath(path))
    _prepare(path, len(data))
    new, lock = _locked_sibling(path, directory=False)
    try:
        with _explain_no_room(path), open(lock, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            os.fsync(lock)
        os.replace(new, path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)
        os.close(lock)


def remove_directory(path: str | Path) -> None:
    """Delete a directory so that nobody finds half of it, and what killed writers and deleters left beside it.

    One that is not there is no error.
    """
    path = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        aside = _sibling(path)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    if path.parent.is_dir():
        _clean(path.parent)


def recover(path: str | Path) -> bool:
    """Put back what a killed writer had renamed aside, if `path` is missing; true if something was put back.

    Readers of a replaceable directory call this first. It does nothing where directories are exchanged in one step.
    """
    path = Path(os.path.realpath(path))
    if path.exists() or not path.parent.is_dir():
        return False
    for aside in path.parent.iterdir():
        found = _OLD.fullmatch(aside.name)
        if found and found["name"] == path.name:
            with contextlib.suppress(OSError):  # another reader was faster
                os.rename(aside, path)
                return True
    return False


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare(path: Path, needed_bytes: int) -> None:
    """Make the parent, clear what killed writers left in it, and see that there is room."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)
    _clean(path.parent)
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        text = f"needs {needed_bytes / 1e6:.1f} MB and {free / 1e6:.1f} MB are free there; nothing was written"
        raise OSError(errno.ENOSPC, text, str(path))


def _sibling(path: Path) -> Path:
    return path.parent / f".smidgen-new-{secrets.token_hex(8)}"


def _locked_sibling(path: Path, *, directory: bool) -> tuple[Path, int]:
    """Make a sibling of `path` and lock it; returns it with the open descriptor that holds the lock."""
    while True:
        new = _sibling(path)
        if directory:
            new.mkdir()
        try:
            lock = os.open(new, os.O_RDONLY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:  # a cleaner took it before it was locked
            continue
        if _lock(lock) is not False and new.exists():
            return new, lock
        os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """True: locked.   False: someone else holds it.   None: this disk has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _clean(parent: Path) -> None:
    """Remove what killed writers left in `parent`."""
    for left in [entry for entry in parent.iterdir() if entry.name.startswith(".smidgen-")]:
        if _NEW.fullmatch(left.name):
            _remove_if_orphan(left)
        # The list was made before this look: a directory renamed aside since then is not in it, so cannot be lost.
        elif (found := _OLD.fullmatch(left.name)) and (parent / found["name"]).exists():
            shutil.rmtree(left, ignore_errors=True)


def _remove_if_orphan(left: Path) -> None:
    try:
        descriptor = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return
    try:
        if _lock(descriptor):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _move_into_place(new: Path, path: Path, replace: bool) -> None:
    """Rename `new` to `path`. What was at `path` is at `new` afterwards, or gone."""
    while True:
        try:
            os.rename(new, path)  # onto nothing, or onto an empty directory
            return _clean(path.parent)  # what was renamed aside below
        except OSError as error:
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if taken and not replace:
                raise _taken(path) from error
            if not taken:
                recover(path)
                raise
        if _exchange(new, path):
            return
        aside = path.parent / f".smidgen-old-{secrets.token_hex(8)}-{path.name}"
        with contextlib.suppress(FileNotFoundError):  # another writer was faster; the loop sees what it left
            os.rename(path, aside)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "is there already; choose another name, or ask to replace it", str(path))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system or the disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sync_tree(folder: Path) -> None:
    """Every file, then every directory, deepest first."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(where, name))
        _sync(Path(where))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some network disks cannot sync a directory
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explain_no_room(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        text = f"no room to write it ({os.strerror(error.errno)}); what was there before is untouched"
        raise OSError(error.errno, text, str(path)) from error
