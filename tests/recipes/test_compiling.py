"""Blocks that are compiled while a run trains."""

import shutil

import pytest
import torch

from smidgen.core.errors import RecipeError
from smidgen.recipes import fit
from smidgen.training import compiling

from .conftest import digest
from .test_replaying import DROPOUT, TOP, same_to_rounding

COMPILED = {"compile": True}
pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # of PyTorch's own
]


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled: paths, each time."""
    found = []
    real = compiling.compiled

    def noted(model, paths):
        found.append(list(paths))
        return real(model, paths)

    monkeypatch.setattr("smidgen.training.loop.compiled", noted)
    return found


def test_a_compiled_run_comes_to_what_the_same_run_comes_to_without(start, tmp_path, compilations):
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    plain = start(out=str(tmp_path / "plain"), train={"compile": False})
    assert not counters
    on = start(train=COMPILED)
    assert compilations == [[], ["body.encoder.layer.0", "body.encoder.layer.1"]]
    assert counters["unique_graphs"] > 0
    same_to_rounding(on, plain)
    assert (on.plan["compile"], "compile" in plain.plan) == ("True", False)
    assert "compile: true" in (on.out / "recipe.yaml").read_text()


def test_a_resumed_compiled_run_equals_an_unbroken_one(start, stopped, tmp_path):
    unbroken = start(out=str(tmp_path / "unbroken"), train=COMPILED, **DROPOUT)
    stopped(train=COMPILED, **DROPOUT)
    assert digest(start(resume=True, train=COMPILED, **DROPOUT).out) == digest(unbroken.out)


def test_what_is_replayed_is_not_compiled(start, tmp_path, compilations):
    off = start(out=str(tmp_path / "off"), train={**TOP, "replay": "off"})
    on = start(train={**TOP, **COMPILED, "replay": "memory"})
    assert compilations == [[], ["body.encoder.layer.1"]]
    same_to_rounding(on, off)


def test_where_memory_is_short_blocks_recompute_instead(start, monkeypatch, compilations):
    monkeypatch.setattr(fit, "free_memory", lambda device: 1)
    run = start(train=COMPILED)
    assert run.plan["recompute"] != "off"
    assert run.plan["compile"] == "False"
    assert compilations == [[]]


def test_what_cannot_be_compiled_is_refused_before_the_run(start, tmp_path, monkeypatch):
    for other in ({"recompute": "all"}, {"shard": True}):
        with pytest.raises(ValueError, match=r"train.compile\n.* are not compiled; leave"):
            start(train={**COMPILED, **other})

    def broken(function):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RecipeError, match=r"PyTorch cannot compile here: no C\+\+ compiler\. Leave it out"):
        start(train=COMPILED)
    with pytest.raises(RecipeError, match=r"compiles blocks, and none are recognised in Linear\. Leave it out"):
        compiling.refuse_compiling(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert not (tmp_path / "out").exists()
