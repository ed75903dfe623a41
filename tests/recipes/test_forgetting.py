"""A run that forgets: the report says so in words, of the tuned model and of full fine-tuning."""

import json

import pytest
from rich.console import Console

from smidgen.recipes.load import recipe_from
from smidgen.recipes.run import tune

FILE = """
import torch
import torch.nn.functional as F
from torch import nn

from smidgen.tasks.pieces import Pieces


def net():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6, 4))
        model[1].weight.copy_(torch.eye(4, 6))
    return model  # gives back what it reads


def rows(count, sign, seed):
    xs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return [(x, sign * x) for x in xs]


def loss(said, true):
    return F.mse_loss(said, true, reduction="none").mean(1)


def make():
    return Pieces(model=net, train=rows(60, -1, 0), loss=loss)


def as_before():
    return rows(20, 1, 1)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgets")
    (folder / "mine.py").write_text(FILE)
    said = {
        "task": f"{folder / 'mine.py'}:make",
        "data": {"shift": {"before": f"{folder / 'mine.py'}:as_before"}},
        "train": {"steps": 20, "batch": 8, "learning_rate": 0.1, "precision": "fp32", "seed": 0},
        "report": {"against": ["full"]},
        "out": str(folder / "out"),
    }
    tune(recipe_from(said), resume=False, fresh=False, console=Console(quiet=True))
    return json.loads((folder / "out/report.json").read_text())


def test_what_the_model_could_before_is_judged_for_tuned_and_full(report):
    [shift] = report["shift"]
    assert (shift["name"], shift["count"]) == ("before", 20)
    assert shift["base"]["value"] == pytest.approx(0, abs=1e-9)
    assert shift["tuned"]["value"] > 1
    assert shift["full"]["value"] > 0
    assert shift["full_difference"]["value"] == pytest.approx(shift["full"]["value"])


def test_the_report_says_in_words_that_it_forgot(report):
    found = [note for note in report["notes"] if note.startswith("On before")]
    assert found[0].startswith("On before tuned is worse than the untouched model by ")
    assert found[1].startswith("On before full fine-tuning is worse than the untouched model by ")
    assert all(note.endswith("it forgot some of what the model could.") for note in found)
