"""The cache: made once, found again, mended when damaged, bounded, and shared by processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smidgen.data.cache import Cache, default_folder

KEY = "0a" * 16


def fill(text: str = "rows"):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        made.append(text)
        (folder / "data").write_text(text)

    made: list[str] = []
    write.made = made  # type: ignore[attr-defined]
    return write


def test_what_was_made_is_found_by_its_key(tmp_path: Path) -> None:
    cache, write = Cache(tmp_path / "new" / "cache"), fill()
    assert cache.entry(KEY, write)[1] == "made"
    path, state = cache.entry(KEY, write)
    assert (state, (path / "data").read_text(), write.made) == ("found", "rows", ["rows"])
    assert cache.entry("1b" * 16, fill("other"))[1] == "made"
    assert (path / "data").read_text() == "rows"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "data").write_text("rowz"),
        lambda path: (path / "data").unlink(),
        lambda path: (path / "files.json").write_text("{"),
        lambda path: (path / "files.json").write_text('{"format": 2, "files": {}}'),
        lambda path: (path / "files.json").write_text('{"format": 1, "files": {"data": 3}}'),
        lambda path: (path / "files.json").unlink(),
    ],
)
def test_what_is_damaged_is_made_anew(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    cache, write = Cache(tmp_path), fill()
    path, _ = cache.entry(KEY, write)
    damage(path)
    assert cache.entry(KEY, write)[1] == "mended"
    assert (path / "data").read_text() == "rows"
    assert cache.entry(KEY, write)[1] == "found"


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Cache(tmp_path).entry(KEY, fails)
    assert [path.name for path in tmp_path.iterdir()] == [".lock-0"]


def test_what_was_used_longest_ago_goes_when_the_room_is_needed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, most_bytes=3500)
    for age, key in enumerate("abc"):
        path, _ = cache.entry(key * 32, fill("x" * 1000))
        os.utime(path, (time.time() - 100 + age,) * 2)
    cache.entry("a" * 32, fill())  # used again
    cache.entry("d" * 32, fill("x" * 1000))
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c", "d"]
    cache.entry("e" * 32, fill("x" * 5000))  # larger than all the room: it stays, as it is needed now
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_dir()) == ["e"]


def test_its_folder_is_where_the_user_says_or_their_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SMIDGEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert default_folder() == tmp_path / "caches" / "smidgen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "smidgen"
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own"


@pytest.mark.skipif(sys.platform == "win32", reason="there two processes both make it")
def test_of_several_processes_one_makes_it_and_the_others_wait_for_it(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from smidgen.data.cache import Cache
def fill(folder):
    (folder / "data").write_text("rows")
    time.sleep(0.3)
path, state = Cache(Path({str(tmp_path)!r})).entry({KEY!r}, fill)
print(state, (path / "data").read_text())
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate()[0].strip() for process in running)
    assert said == ["found rows", "found rows", "made rows"]
