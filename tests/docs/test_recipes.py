"""docs/recipes.md tells of every key, flag and preset that there is, and of no other."""

import re
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from smidgen.auto.presets import _PRESETS, preset
from smidgen.recipes.load import FLAGS, load_recipe
from smidgen.recipes.schema import PARTS, Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its head left out."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def keys() -> list[str]:
    """All keys of a recipe, in its order; of a method the name alone."""
    found = []
    for name in Recipe.model_fields:
        inner = ["name"] if name == "method" else PARTS[name].model_fields if name in PARTS else []
        found += [f"{name}.{key}" for key in inner] or [name]
    return found


def test_every_key_of_a_recipe_is_in_the_table_and_no_other():
    assert [row[0] for row in table("Keys")] == keys()


def test_every_flag_is_beside_its_key():
    shown = {flag.split()[0]: key for key, flag, *_ in table("Keys") if flag}
    assert shown == {**FLAGS, "--shift": "data.shift"}


def test_what_is_needed_is_said_so_and_nothing_else_is():
    from smidgen.core.errors import RecipeError

    with pytest.raises(RecipeError) as error:
        load_recipe()
    needed = {row[0] for row in table("Keys") if row[3] == "needed"}
    assert needed == {"model.path", "data.train"}
    assert all(key.partition(".")[0] in str(error.value) for key in needed)


def test_the_presets_are_those_of_the_program():
    rows = {name: numbers for name, *numbers in table("Presets")}
    assert rows.keys() == {*_PRESETS, "any other"}
    for name, (rate, head, decay, epochs, settings) in rows.items():
        found = preset(name)
        assert [float(rate), float(head), float(decay), float(epochs)] == [
            found.learning_rate,
            found.head_learning_rate,
            found.weight_decay,
            found.epochs,
        ], name
        assert settings == ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in found.settings.items())


def test_the_example_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```yaml (\S+)\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    Path(found[1]).write_text(found[2])
    recipe = load_recipe(found[1])
    assert (recipe.method_object().rank, recipe.train.minutes, recipe.report.against) == (16, 10, ("full",))
    assert Path("recipe.yaml") == Path(found[1])
