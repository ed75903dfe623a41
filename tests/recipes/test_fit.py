"""A run in the memory that there is: what the plan says, what it chooses, and what it does where it was wrong."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertModel

from smidgen.auto.plan import Plan
from smidgen.core.errors import RecipeError
from smidgen.core.files import sha256_file
from smidgen.core.recompute import LEVELS
from smidgen.data.batches import LengthBucketedBatches
from smidgen.recipes import fit
from smidgen.recipes.choose import Chosen
from smidgen.recipes.load import load_recipe
from smidgen.recipes.schema import TrainPart
from smidgen.training import loop


def digest(run) -> str:
    return sha256_file(run.out / "adapter_model.safetensors")


def reasons(run) -> dict[str, str]:
    return {entry["setting"]: entry["why"] for entry in run.report["plan"]}


@pytest.fixture
def free(monkeypatch):
    """A function that says how much memory is free, in bytes."""

    def free(size_bytes: int | None) -> None:
        monkeypatch.setattr(fit, "free_memory", lambda device: size_bytes)

    return free


def test_the_plan_says_what_a_run_takes_of_what_is_there(start, free):
    free(int(2e9))
    run = start()
    assert run.plan["recompute"] == "off"
    about, of, there = run.plan["memory"].removeprefix("about ").partition(" of ")
    assert (of, there, about.endswith(" MB")) == (" of ", "2.0 GB", True)
    assert reasons(run)["memory"].startswith("weights 0.")


def test_every_level_learns_the_same_bits(start, tmp_path):
    bits = {}
    for level in LEVELS:
        run = start(out=str(tmp_path / level), train={"recompute": level}, method={"name": "lora", "dropout": 0.2})
        assert (run.plan["recompute"], reasons(run)["recompute"]) == (level, "you said so")
        assert f"recompute: {level}" in (run.out / "recipe.yaml").read_text()
        bits[level] = digest(run)
    assert len({*bits.values()}) == 1


@pytest.mark.parametrize(
    ("rows", "recompute", "batch"),
    [
        (8000, "off", "8"),
        (7900, "cheap", "8"),
        (4800, "cheap", "8"),
        (4700, "all", "8"),
        (1600, "all", "8"),
        (1500, "all", "8, 4 at a time"),
        (700, "all", "8, 2 at a time"),
        (100, "all", "8, 1 at a time"),
    ],
)
def test_less_is_kept_where_less_is_free_and_then_the_batch_is_cut(free, monkeypatch, rows, recompute, batch):
    """A row takes 1000 bytes by level off, 600 by cheap, 200 by all; 50 parameters are trained, with 12 bytes each."""
    sizes = {"off": 1000.0, "cheap": 600.0, "all": 200.0}
    monkeypatch.setattr(fit, "_per_row", lambda work, accelerator, level, *rest, is_sent_away: sizes[level])
    free(math.ceil((600 + rows) / 0.9))
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    chosen, plan = Chosen(**{f.name: None for f in dataclasses.fields(Chosen)}), Plan()
    chosen.batch, chosen.split, chosen.optimizer = plan.decide("batch", None, 8, ""), 1, "adamw"
    work = SimpleNamespace(model=nn.ModuleDict({"body": blocks}))
    fit.choose_memory(TrainPart(), chosen, work, 50, SimpleNamespace(device=None), plan)
    said = {name: value for name, value, _ in plan.entries}
    assert (said["recompute"], said["batch"], chosen.recompute) == (recompute, batch, recompute)


def test_what_a_row_takes_is_less_the_less_is_kept(start, free, monkeypatch):
    measured = {}
    per_row = fit._per_row

    def spied(work, accelerator, level, *rest, is_sent_away):
        measured[level] = per_row(work, accelerator, level, *rest, is_sent_away=False)
        sent_away[level] = per_row(work, accelerator, level, 4, *rest[1:], is_sent_away=True)  # of four blocks
        return measured[level]

    sent_away: dict[str, float] = {}
    monkeypatch.setattr(fit, "_per_row", spied)
    free(1)
    start()
    assert list(measured) == list(LEVELS)
    assert measured["off"] > measured["cheap"] > measured["all"] > sent_away["all"] > 0
    assert sent_away["off"] == pytest.approx(measured["off"], rel=0.02)


def test_a_batch_that_does_not_fit_is_found_before_the_run_and_learns_the_same(start, monkeypatch, tmp_path):
    """On a machine where 3 rows fit: 2 of 8 at a time, and the step stays what it was."""
    plain = start(out=str(tmp_path / "plain"))
    forward, tried = BertModel.forward, list[int]()

    def short(self, input_ids, **kwargs):
        if torch.is_grad_enabled():
            tried.append(len(input_ids))
            if tried[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(BertModel, "forward", functools.wraps(forward)(short))
    run = start(out=str(tmp_path / "short"))
    assert run.plan["batch"] == "8, 2 at a time"
    assert reasons(run)["batch"] == "more did not fit in memory when it was tried; the step stays that of 8"
    assert [size for size in tried if size > 3] == [8, 4]  # once each, and never again
    assert "batch: 8" in (run.out / "recipe.yaml").read_text()  # another machine may have more
    losses = [[value for _, value in r.report["curves"]["train loss"]] for r in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_run_that_has_to_cut_its_batch_on_the_way_says_so(start, monkeypatch):
    calls, step = [], loop.Loop._step

    def short(self, *args):
        calls.append(self.history["split"])
        if len(calls) in (3, 4):
            raise MemoryError("no memory")
        return step(self, *args)

    monkeypatch.setattr(loop.Loop, "_step", short)
    run = start()
    assert calls == [1, 1, 1, 2, 4, 4, 4, 4]
    assert "Memory did not suffice for a batch at once: in the end 2 rows ran at a time." in run.report["notes"]


def test_what_cannot_be_is_said_with_its_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: package:x\ndata: y.csv\ntrain:\n  recompute: cheap\n  offload: cpu\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:5: cpu moves the kept inputs of blocks; say recompute: all"):
        load_recipe(recipe)
    recipe.write_text("model: package:x\ndata: y.csv\ntrain:\n  recompute: of\n  optimizer: adam\n")
    with pytest.raises(RecipeError, match=r'4: train\.recompute is "of"(.|\n)*5: train\.optimizer is "adam"'):
        load_recipe(recipe)


def test_offload_on_a_cpu_is_refused_before_the_run(start):
    with pytest.raises(
        RecipeError, match=r"train\.offload: cpu moves what a GPU keeps to the host; this run is on cpu"
    ):
        start(train={"recompute": "all", "offload": "cpu"})


def test_the_longest_rows_are_tried_first():
    lengths = [3, 9, 1, 7, 5]
    longest = LengthBucketedBatches(lengths, batch_size=2, seed=0, shuffle=False)
    assert next(iter(longest)) == [1, 3]
