"""Files are old or new, whole, whatever moment the writer is killed."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from smidgen.core import files

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "close")
forking = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def fill(path: Path, text: str, *, replace: bool = True) -> None:
    with files.atomic_directory(path, replace=replace) as new:
        (new / "inner").mkdir()
        (new / "a").write_text(text)
        (new / "inner" / "b").write_text(text)


def content(path: Path) -> list[str]:
    return [(path / "a").read_text(), (path / "inner" / "b").read_text()]


def killed_at_call(number: int, path: Path) -> bool:
    """Replace `path` in a child that dies, as by kill -9, before its system call `number`; false if it had fewer."""
    child = os.fork()
    if child == 0:
        left = number

        def dying(call):
            def wrapper(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return call(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(files.os, name, dying(getattr(os, name)))
        try:
            fill(path, "new")
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@forking
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two_renames"])
def test_a_kill_before_any_system_call_leaves_the_old_or_the_new_directory(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path, number, seen, recovered = tmp_path / "adapter", 0, set(), 0
    fill(path, "old")
    while killed_at_call(number, path):
        recovered += files.recover(path)
        text = content(path)
        assert text in (["old", "old"], ["new", "new"])
        seen.add(text[0])
        fill(path, "old")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter"]  # what was left is cleaned up
        number += 1
    assert number > 10
    assert seen == {"old", "new"}
    assert recovered == (0 if exchange else 1)  # the one moment between the two renames
    assert content(path) == ["new", "new"]


def test_every_file_is_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    happened = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda *names: (happened.append("rename"), rename(*names)))
    fill(tmp_path / "adapter", "new")
    before, after = happened[: happened.index("rename")], happened[happened.index("rename") + 1 :]
    hidden = before[-1]
    assert set(before) == {f"{hidden}/a", f"{hidden}/inner/b", f"{hidden}/inner", hidden}
    assert after == [str(tmp_path)]


def test_an_exception_leaves_everything_as_it_was(tmp_path):
    fill(tmp_path / "adapter", "old")

    def interrupted():
        with files.atomic_directory(tmp_path / "adapter", replace=True) as new:
            (new / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path / "adapter") == ["old", "old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_what_is_there_is_not_replaced_unless_asked(tmp_path):
    fill(tmp_path / "adapter", "old")
    with pytest.raises(FileExistsError, match="ask to replace it"):
        fill(tmp_path / "adapter", "new", replace=False)
    assert content(tmp_path / "adapter") == ["old", "old"]
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new", replace=False)
    assert content(tmp_path / "empty") == ["new", "new"]


def test_the_work_of_a_living_writer_is_not_cleaned_up(tmp_path):
    with files.atomic_directory(tmp_path / "one") as new:
        (new / "a").write_text("one")
        fill(tmp_path / "two", "two")
        files.atomic_write(tmp_path / "three", b"three")
    assert (tmp_path / "one" / "a").read_text() == "one"


def test_only_our_own_left_overs_are_cleaned_up(tmp_path):
    (tmp_path / ".smidgen-new-0123456789abcdef").mkdir()
    (tmp_path / ".smidgen-new-notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    files.atomic_write(tmp_path / "file", b"")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".hidden", ".smidgen-new-notes", "file"]


def test_a_file_is_written_whole_and_replaced(tmp_path):
    files.atomic_write(tmp_path / "deep" / "file", b"old")
    files.atomic_write(tmp_path / "deep" / "file", b"new")
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert files.sha256_file(tmp_path / "deep" / "file").startswith("11507a0e2f5e69d5")  # printf new | sha256sum


def test_too_little_room_is_found_before_anything_is_written(tmp_path):
    directory = files.atomic_directory(tmp_path / "adapter", needed_bytes=1 << 60)
    with pytest.raises(OSError, match="MB are free there; nothing was written") as caught, directory:
        pytest.fail("the block was entered")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_state_and_says_so(tmp_path):
    fill(tmp_path / "adapter", "old")
    files.atomic_write(tmp_path / "file", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no room to write it .*untouched"):
            fill(tmp_path / "adapter", "x" * 2000)
        with pytest.raises(OSError, match=r"no room to write it .*untouched"):
            files.atomic_write(tmp_path / "file", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path / "adapter") == ["old", "old"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "file"]


def test_a_failing_rename_leaves_the_old_directory(tmp_path, monkeypatch):
    """As network disks do now and then."""
    fill(tmp_path / "adapter", "old")

    def failing(old, new):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="input/output error"):
        fill(tmp_path / "adapter", "new")
    assert content(tmp_path / "adapter") == ["old", "old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_removed_directory_is_gone_at_once(tmp_path, monkeypatch):
    fill(tmp_path / "adapter", "old")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it began
    files.remove_directory(tmp_path / "adapter")
    files.remove_directory(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
