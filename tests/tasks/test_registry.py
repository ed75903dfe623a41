"""Tasks are found by name, by file, and in other packages; what is not there is said with what is near."""

import sys
from pathlib import Path

import pytest

from smidgen.core.errors import ModelError, RecipeError
from smidgen.tasks import registry
from smidgen.tasks.custom import Custom
from smidgen.tasks.models import locate
from smidgen.tasks.own.python_file import names_file, object_in_file
from smidgen.tasks.registry import task_named, task_said, tasks

PACKAGED = """
from smidgen.tasks.custom import Custom
from smidgen.tasks.registry import task

@task("weather")
class Weather(Custom):
    summary = "tomorrow's weather"
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of tasks whose changes are undone."""
    monkeypatch.setattr(registry, "_TASKS", dict(tasks()))


@pytest.mark.usefixtures("table")
def test_each_of_our_files_with_a_task_is_listed_under_its_name():
    listed = tasks()
    assert list(listed) == sorted(listed)
    assert {"custom", "text_classification"} <= set(listed)
    for name, cls in listed.items():
        assert cls.name == name
        assert cls.summary
        assert isinstance(cls.roles, tuple)
        assert cls.Settings() is not None  # every setting has a default


@pytest.mark.usefixtures("table")
def test_an_unknown_task_is_said_with_those_that_are_near():
    with pytest.raises(
        RecipeError, match=r'there is no task "text_clasification". Did you mean "text_classification"\?'
    ):
        task_named("text_clasification")
    with pytest.raises(RecipeError, match=r'there is no task "zzzz". There are: .*custom.*text_classification'):
        task_named("zzzz")
    for sneaky in ("base", "os.path", "../custom", ""):
        with pytest.raises(RecipeError, match="there is no task"):
            task_named(sneaky)


@pytest.mark.usefixtures("table")
def test_another_package_brings_a_task_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "weather_package.py").write_text(PACKAGED)
    info = tmp_path / "weather_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weather-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[smidgen.tasks]\nweather = weather_package:Weather\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert task_named("weather").summary == "tomorrow's weather"
    assert "weather" in tasks()
    monkeypatch.delitem(sys.modules, "weather_package")


def test_a_task_is_said_by_name_or_by_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def make():\n    raise RuntimeError('run too early')\n")
    assert issubclass(task_said(f"{file}:make"), Custom)
    assert task_said("custom") is Custom
    with pytest.raises(RecipeError, match="there is no task"):
        task_named(f"{file}:make")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "make", "there is no file"),
        ("def make(): pass", "mke", r"has no mke\. Did you mean make\?"),
        ("import nowhere", "make", "fails when it is run: ModuleNotFoundError: No module named 'nowhere'"),
        ("def make(:", "make", "fails when it is run: SyntaxError"),
        ("make = 1", "", r"has no \."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str | None, name: str, message: str):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        object_in_file(f"{file}:{name}")


def test_a_file_is_run_once_and_may_import_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "the_neighbour.py").write_text("count = []\n")
    file = tmp_path / "mine.py"
    file.write_text("from the_neighbour import count\n\ncount.append(1)\n")
    assert object_in_file(f"{file}:count") == [1]
    assert object_in_file(f"{file}:count") == [1]
    assert names_file("mine.py:count")
    assert not names_file("owner/name.py")
    monkeypatch.delitem(sys.modules, "the_neighbour")


def test_a_model_may_be_made_by_a_function_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\n\ndef good():\n    return nn.Linear(2, 3)\n\ndef bad():\n    return 3\n")
    found = locate(f"{file}:good")
    assert found.is_made
    assert found.made().out_features == 3
    with pytest.raises(ModelError, match=r"returns int; it is to return a torch.nn.Module"):
        locate(f"{file}:bad").made()
