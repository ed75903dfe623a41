"""A head alone: the rows of new users learn, nothing of the model does; refused where there is nothing to learn."""

import json

import pytest
import torch
from rich.console import Console

from smidgen.core.errors import RecipeError
from smidgen.core.files import sha256_file
from smidgen.recipes.load import recipe_from
from smidgen.recipes.run import tune
from smidgen.recipes.save import load_result
from smidgen.tasks.ranking.recommenders import Known, MatrixFactorisation, save_recommender


@pytest.fixture
def said(tmp_path):
    """A recipe for a recommender of 6 users and 8 items, with the rows of two new users."""
    pairs = torch.tensor([(u, (u + k) % 8) for u in range(6) for k in range(3)])
    known = Known(users=tuple(f"u{i}" for i in range(6)), items=tuple(f"i{i}" for i in range(8)), interactions=pairs)
    save_recommender(MatrixFactorisation(known, width=4), tmp_path / "base")
    rows = [(user, f"i{(start + k) % 8}", k) for start, user in enumerate(("new", "newer")) for k in range(6)]
    lines = ["user,item,time", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    return {
        "model": str(tmp_path / "base"),
        "task": "recommendation",
        "data": str(tmp_path / "train.csv"),
        "method": "head",
        "train": {"steps": 6, "batch": 4, "precision": "fp32"},
        "out": str(tmp_path / "out"),
    }


def test_the_rows_of_new_users_are_all_that_is_trained_and_come_back(said, tmp_path):
    before = sha256_file(tmp_path / "base" / "model.safetensors")
    out = tune(recipe_from(said), resume=False, fresh=False, console=Console(quiet=True))
    rows = {row["name"]: row for row in json.loads((out / "report.json").read_text())["rows"]}
    assert rows["tuned"]["trainable"] == 2 * 4  # two users' rows of width 4
    assert sha256_file(tmp_path / "base" / "model.safetensors") == before
    tuned = load_result(out)
    assert tuned.adapters is not None
    assert list(tuned.adapters.parameters()) == []
    assert tuned.model.head.users.weight.shape == (2, 4)


def test_where_nothing_is_new_there_is_nothing_to_train_alone(said, tmp_path):
    rows = ["user,item,time", *(f"u{k % 6},i{(k * 3 + 4) % 8},{k}" for k in range(20))]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(RecipeError, match=r"recommendation adds nothing to .* that could be trained alone"):
        tune(recipe_from(said), resume=False, fresh=False, console=Console(quiet=True))
