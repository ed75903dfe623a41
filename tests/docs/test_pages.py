"""What the pages say happens, happens: their blocks are run, those of a page in order and in a folder of its own.

    python              runs; names made before it on the page are there
    python sketch       is not run; that it parses, tools/check_docs.py sees to
    python raises       raises what the `text` block after it says
    console             "$ smidgen ..." says what stands below it, where errors go
    console sketch      is not run
    yaml NAME.yaml ...  the file of this name: a recipe, a table, a Python file

In what is said, "..." stands for anything.  The folder holds what every user has: models/minilm, a model, and
reviews.csv, texts with labels.
"""

import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest

from smidgen import SmidgenError
from smidgen.core.method import methods
from smidgen.tasks.registry import tasks

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import reviews, tiny_bert, write_csv

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^( *)```(\w+) ?([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page.   kind: "python", "console", ...   note: what stands behind that."""

    kind: str
    note: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [Block(m[2], m[3], dedent(m[4]), text.count("\n", 0, m.start(4)) + 1) for m in FENCED.finditer(text)]


def is_run(block: Block) -> bool:
    """True if the block does something when the page is run."""
    return block.kind in ("console", "python") and block.note != "sketch" and "." not in block.note


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if any(map(is_run, blocks_of(p)))]


def words(text: str) -> str:
    """Text on one line: pages wrap what programs do not."""
    return " ".join(text.split())


def as_said(expected: str, said: str) -> bool:
    """True if the page tells what was said."""
    return re.fullmatch(".*".join(map(re.escape, words(expected).split("..."))), words(said)) is not None


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page starts from."""
    folder = tmp_path_factory.mktemp("start")
    tiny_bert(folder / "models" / "minilm")
    write_csv(folder / "reviews.csv", reviews(60))
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("smidgen.core.method._METHODS", methods())  # a page may add one
    monkeypatch.setattr("smidgen.tasks.registry._TASKS", tasks())
    monkeypatch.setattr(sys, "path", [*sys.path])  # a file's folder is added
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = blocks_of(page)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if "." in block.note:
            Path(block.note).write_text(block.text)
        elif not is_run(block):
            continue
        elif block.kind == "console":
            say(block, page)
        elif block.note == "raises":
            assert following is not None, f"{page.name}:{block.line}: what it raises is not said"
            error = raised(block, page, names)
            assert as_said(following.text, error), f"{page.name}:{following.line}: {error}"
        else:
            run(block, page, names)


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run Python with errors that name the line of the page."""
    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def raised(block: Block, page: Path, names: dict[str, Any]) -> str:
    """The exception that Python raises, as a traceback's last line has it."""
    with pytest.raises(SmidgenError) as found:
        run(block, page, names)
    return f"{type(found.value).__name__}: {found.value}"


def say(block: Block, page: Path) -> None:
    """Run each command of a console block and compare what it says where errors go."""
    from typer.testing import CliRunner

    from smidgen.cli.app import app

    for command in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, expected = command.partition("\n")
        arguments = shlex.split(line)
        assert arguments[0] == "smidgen", f"{page.name}:{block.line}: {line}"
        with warnings.catch_warnings():
            done = CliRunner(env={"NO_COLOR": "1"}).invoke(app, arguments[1:])
        assert as_said(expected, done.stderr), f"{page.name}:{block.line}: {line}\n{done.output}"


def test_the_pages_that_show_code_are_found() -> None:
    assert {"errors.md", "loops.md", "README.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", page.read_text()))
    absent = [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "src" / "smidgen"))]
    made_here = {
        *("src/smidgen/methods/lora_xs.py", "tests/methods/test_lora_xs.py"),
        "src/smidgen/tasks/ordinal.py",
    }
    assert set(absent) <= made_here
