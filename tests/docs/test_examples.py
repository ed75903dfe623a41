"""Each folder of examples/ is one that `make example` can run, as far as that shows without its data and packages."""

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from smidgen.recipes.load import load_recipe
from smidgen.tasks.own.python_file import names_file
from smidgen.tasks.registry import tasks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
FILES = sorted(EXAMPLES.glob("*/*.py"))


def short(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.mark.parametrize("path", RECIPES, ids=short)
def test_a_recipe_says_what_there_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths are seen from where `make example` runs
    recipe = load_recipe(path)
    recipe.method_object()
    said = [recipe.task.name, recipe.model.path, recipe.data.train, *recipe.data.shift.values()]
    for place in filter(names_file, map(str, said)):
        file, _, name = place.rpartition(":")
        assert f"def {name}(" in Path(file).read_text(), f"{short(path)} names {place}"
    if not names_file(recipe.task.name):
        recipe.task.build()
        roles = tasks()[recipe.task.name].roles
        assert recipe.data.columns.keys() <= set(roles), f"{short(path)}: roles of {recipe.task.name} are {roles}"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_a_python_file_compiles(path: Path) -> None:
    compile(path.read_text(), str(path), "exec", dont_inherit=True)


def test_each_folder_has_what_make_example_asks_for() -> None:
    folders = sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith("_"))
    assert {path.parent for path in RECIPES} == set(folders)
    for folder in folders:
        assert {"recipe.yaml", "prepare.py", "requirements.txt"} <= {path.name for path in folder.iterdir()}
