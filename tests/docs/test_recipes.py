"""docs/recipes.md tells of every key, flag and preset that there is, and of no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from smidgen.auto.presets import PRESETS
from smidgen.core.method import methods
from smidgen.recipes.load import FLAGS, PAIRS, load_recipe
from smidgen.recipes.schema import PARTS, Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head left out."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def keys() -> list[str]:
    """All keys of a recipe, in its order; of what a task or a method has for itself, those with a flag."""
    found = []
    for name in Recipe.model_fields:
        known = [
            f"{name}.{key}"
            for key in (["name"] if name == "method" else PARTS[name].model_fields if name in PARTS else [])
        ]
        found += [key for at in known for key in (at, *(k for k in FLAGS.values() if k.startswith(f"{at}.")))] or [name]
        found += [k for k in FLAGS.values() if k.startswith(f"{name}.") and k not in found]
    return found


def test_every_key_of_a_recipe_is_in_the_table_and_no_other():
    assert [row[0] for row in table("Keys")] == keys()


def test_every_flag_is_beside_its_key():
    shown = {flag.split()[0]: key for key, flag, *_ in table("Keys") if flag}
    assert shown == {**FLAGS, **{flag: key for flag, (key, *_) in PAIRS.items()}}


def test_what_is_needed_is_said_so_and_nothing_else_is():
    from smidgen.core.errors import RecipeError

    with pytest.raises(RecipeError) as error:
        load_recipe()
    needed = {row[0] for row in table("Keys") if row[3] == "needed"}
    assert needed == {"model.path", "data.train"}
    assert all(key.partition(".")[0] in str(error.value) for key in needed)


def test_the_pages_of_methods_and_presets_are_as_they_are_made():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "methods_page.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_method_has_a_preset():
    assert methods().keys() - PRESETS.keys() == set()


def test_the_example_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```yaml (\S+)\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    Path(found[1]).write_text(found[2])
    recipe = load_recipe(found[1])
    assert (recipe.method_object().rank, recipe.train.minutes, recipe.report.against) == (16, 10, ("full",))
    assert Path("recipe.yaml") == Path(found[1])
