"""A recipe is frozen, says None where the plan decides, and is written so that it loads back equal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import smidgen
from smidgen.core.method import methods
from smidgen.recipes.load import load_recipe, recipe_from
from smidgen.recipes.method_part import MethodPart, method_fields
from smidgen.recipes.schema import Recipe

SMALLEST = {"model": "models/minilm", "data": "reviews.csv"}
TEXT = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(lambda t: "\0" not in t)


def test_what_nobody_said_is_none():
    recipe = recipe_from(SMALLEST)
    assert recipe.model.path == "models/minilm"
    assert recipe.data.train == "reviews.csv"
    assert recipe.method is None
    assert recipe.out is None
    assert set(recipe.train.model_dump().values()) == {None}


def test_a_recipe_without_a_method_is_lora_with_its_own_defaults():
    assert repr(recipe_from(SMALLEST).method_object()) == repr(smidgen.LoRA())


def test_the_keys_of_a_method_are_its_fields():
    method = recipe_from(
        {**SMALLEST, "method": {"name": "lora", "rank": 4, "alpha": 8, "heads": ["pooler"]}}
    ).method_object()
    assert (method.rank, method.alpha, method.heads) == (4, 8.0, ("pooler",))


def test_targets_are_auto_a_pattern_or_a_list_of_them():
    for said, shown in [
        ("auto", "Targets(auto)"),
        ("*.q", 'Targets("*.q")'),
        (["*.q", "*.v"], 'Targets("*.q", "*.v")'),
    ]:
        assert repr(MethodPart(name="lora", targets=said).build().targets) == shown


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_can_be_said_in_a_recipe(name):
    settings = {
        key: value for key, value in methods()[name]().settings().items() if isinstance(value, int | float | str)
    }
    part = MethodPart(name=name, targets="auto", **settings)
    assert part.build().settings() == methods()[name]().settings()
    assert method_fields(methods()[name])[-2:] == ["targets", "heads"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        recipe_from(SMALLEST).out = Path("elsewhere")


@given(
    st.fixed_dictionaries(
        {
            "model": TEXT,
            "data": st.fixed_dictionaries({"train": TEXT}, optional={"shift": st.dictionaries(TEXT, TEXT, max_size=2)}),
        },
        optional={
            "method": st.fixed_dictionaries(
                {"name": st.just("lora")}, optional={"rank": st.integers(1, 99), "heads": st.lists(TEXT)}
            ),
            "train": st.fixed_dictionaries(
                {}, optional={"learning_rate": st.floats(1e-30, 1e30), "batch": st.integers(1, 10**6)}
            ),
            "report": st.fixed_dictionaries({}, optional={"against": st.just(["full"]), "metric": TEXT}),
            "dry_run": st.booleans(),
        },
    )
)
def test_a_recipe_loads_back_equal(tmp_path_factory, values):
    recipe = recipe_from(values)
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_a_written_recipe_has_only_what_was_said():
    text = recipe_from({**SMALLEST, "train": {"batch": 8}, "out": "out/x"}).to_yaml()
    assert text == (
        "recipe: 1\nmodel:\n  path: models/minilm\ndata:\n  train: reviews.csv\n  on_bad_row: fail\n"
        "task:\n  name: text_classification\ntrain:\n  batch: 8\nout: out/x\n"
    )


def test_python_can_make_a_recipe_too():
    assert Recipe(model={"path": "models/minilm"}, data="reviews.csv") == recipe_from(SMALLEST)
