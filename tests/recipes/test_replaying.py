"""A run whose frozen part is computed once: the same result, sooner; and when it is not done, and why."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from smidgen.core.errors import CheckpointError, RecipeError
from smidgen.recipes import replaying
from smidgen.recipes.choose import Speed
from smidgen.recipes.run import tune
from smidgen.recipes.schema import Recipe, TrainPart
from smidgen.training.replay import Replay

from ..tiny import GOOD, reviews, write_csv
from ..tiny_lm import tiny_lm
from .conftest import digest, names

TOP = {"steps": 12, "top_layers": 1, "evaluate_every": 4}
DROPOUT = {"method": {"name": "lora", "dropout": 0.2}}


def why(run):
    return next(entry["why"] for entry in run.report["plan"] if entry["setting"] == "replay")


def curves(run):
    return {name: [value for _, value in points] for name, points in run.report["curves"].items()}


def same_to_rounding(one, other):
    for name, values in curves(other).items():
        assert curves(one)[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name
    for name, row in other.rows.items():
        assert one.rows[name]["value"] == pytest.approx(row["value"], rel=1e-4), name


@pytest.mark.parametrize(("place", "quantize"), [("memory", None), ("disk", None), ("memory", "nf4"), ("disk", "int8")])
def test_a_replayed_run_comes_to_what_the_same_run_comes_to_without(start, tmp_path, bert, place, quantize):
    model = {"path": str(bert), "quantize": quantize}
    off = start(out=str(tmp_path / "off"), model=model, train={**TOP, "replay": "off"})
    on = start(model=model, train={**TOP, "replay": place})
    assert (off.plan["replay"], on.plan["replay"]) == ("off", place)
    assert why(off) == "you said so"
    assert why(on).startswith("what is frozen up to body.encoder.layer.0 runs once; a step then takes ")
    same_to_rounding(on, off)
    assert names(tmp_path) == ["off", "out"]  # nothing of it is left


def test_the_top_layers_are_the_method_s_own_places_in_the_last_blocks(start):
    run = start(train=TOP)
    places = json.loads((run.out / "smidgen.json").read_text())
    assert "encoder.layer.1.attention.self.query" in json.dumps(places)
    assert "encoder.layer.0" not in json.dumps(places)
    assert run.plan["sites"] == "6"
    assert "top_layers: 1" in (run.out / "recipe.yaml").read_text()


def test_top_layers_that_leave_nothing_are_refused(start):
    with pytest.raises(RecipeError, match=r"none of the 2 places of prompt_tuning is in the last 1 of 2 blocks"):
        start(method="prompt_tuning", train=TOP)
    with pytest.raises(RecipeError, match=r"selective chooses among all parameters; name method\.targets instead"):
        start(method="selective", train=TOP)


def test_more_top_layers_than_there_are_are_refused(start):
    with pytest.raises(RecipeError, match=r"train\.top_layers is 3, and the model has 2 blocks"):
        start(train={"top_layers": 3})


def test_where_training_begins_at_the_bottom_nothing_is_kept(start):
    run = start(train={"replay": "memory"})
    assert (run.plan["replay"], why(run)) == ("off", "what is trained begins at the bottom of the model")


def test_rows_that_fit_nowhere_are_computed(start, monkeypatch):
    monkeypatch.setattr(replaying, "room_in_memory", lambda *_: 1000)
    monkeypatch.setattr(replaying, "room_on_disk", lambda *_: 1000)
    run = start(train={**TOP, "replay": "memory"})
    assert run.plan["replay"] == "off"
    assert why(run) == "its rows take 0.1 MB in 16 bit, and 0.0 MB of memory may be used"


def test_what_memory_cannot_hold_goes_to_disk_and_what_that_cannot_is_rounded(start, monkeypatch, tmp_path):
    off = start(out=str(tmp_path / "off"), train={**TOP, "replay": "off"})
    whole = 130 * 12 * 32 * 4  # more than rows, tokens, numbers and bytes
    monkeypatch.setattr(replaying, "room_in_memory", lambda *_: 1000)
    assert start(fresh=True, train={**TOP, "replay": "auto"}).plan["replay"] in ("disk", "off")  # as the clock says
    monkeypatch.setattr(replaying, "room_on_disk", lambda *_: whole // 2)
    run = start(fresh=True, train={**TOP, "replay": "disk"})
    assert (run.plan["replay"], why(run).endswith("rounded to bfloat16")) == ("disk", True)
    for name, values in curves(off).items():
        if "loss" in name:
            assert curves(run)[name] == pytest.approx(values, abs=0.02)


def test_the_linear_probe_s_pass_has_recorded_all_training_rows(start, monkeypatch):
    seen, fill = [], Replay.fill

    def filled(self, name, *args):
        seen.append((self.store.is_whole("train"), self.store.is_whole("test")))
        fill(self, name, *args)

    monkeypatch.setattr(Replay, "fill", filled)
    start(train={**TOP, "replay": "memory"})
    start(fresh=True, train={**TOP, "replay": "disk"})
    assert seen == [(True, True), (False, False)]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(start, stopped, tmp_path, place):
    recipe = {**DROPOUT, "train": {"top_layers": 1, "replay": place}}
    unbroken = start(out=str(tmp_path / "unbroken"), **recipe)
    checkpoints = stopped(**recipe)
    assert ("replay" in names(checkpoints)) == (place == "disk")
    resumed = start(resume=True, **recipe)
    assert "Resuming at step 4 of 6" in resumed.said
    assert digest(resumed.out) == digest(unbroken.out)
    assert resumed.report["curves"] == unbroken.report["curves"]
    assert resumed.plan | {"memory": ""} == unbroken.plan | {"memory": ""}  # of what was free then
    assert names(tmp_path) == ["out", "unbroken"]


def test_a_damaged_file_is_told_and_recorded_again(start, stopped, tmp_path):
    recipe = {"train": {"top_layers": 1, "replay": "disk"}}
    unbroken = start(out=str(tmp_path / "unbroken"), **recipe)
    path = stopped(**recipe) / "replay" / "train.rows"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    resumed = start(resume=True, **recipe)
    assert "train.rows is not as it was written; recorded again" in resumed.said
    assert digest(resumed.out) == digest(unbroken.out)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_file_of_a_base_of_which_one_weight_has_changed_is_recorded_again(
    start, stopped, bert, with_other_weight, quantize
):
    train = {"top_layers": 1, "replay": "disk"}
    checkpoints = stopped(train=train, model={"path": str(bert), "quantize": quantize})
    for path in checkpoints.glob("step-*"):  # killed before the first
        shutil.rmtree(path)
    run = start(resume=True, train=train, model={"path": str(with_other_weight), "quantize": quantize})
    assert "train.rows is of other rows, another model or another version; recorded again" in run.said


def test_a_run_that_replayed_is_not_resumed_where_it_cannot(start, stopped, monkeypatch):
    recipe = {"train": {"top_layers": 1, "replay": "memory"}}
    stopped(**recipe)
    monkeypatch.setattr(replaying, "room_in_memory", lambda *_: 1000)
    monkeypatch.setattr(replaying, "foresee", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=r"replays the frozen part .* more than may be used .*--fresh"):
        start(resume=True, **recipe)


def test_a_dry_run_says_it_and_writes_nothing(start, tmp_path):
    assert "what is frozen up to body.encoder.layer.0" in " ".join(
        start(dry_run=True, train={**TOP, "replay": "disk"}).said.split()
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "minutes", "processes", "pays"),
    [
        (100, None, 1, False),  # each row is seen once, and recording costs what replaying saves
        (101, None, 1, True),
        (None, None, 2, True),  # three epochs: each process records all rows, and sees half of them in an epoch
        (None, None, 4, False),
        (1000, 10, 1, True),  # 600 steps of a second fit; replayed, after 75 s of recording, all 1,000
        (1000, 1, 1, False),  # the minute would be over before all rows are recorded
    ],
)
def test_it_pays_from_the_second_look_at_a_row_on(steps, minutes, processes, pays):
    """800 rows in batches of 8: 100 s to see them all, 25 s where they are replayed."""
    chosen = SimpleNamespace(batch=8, accumulate=1, minutes=minutes, epochs=3)
    work, machine = SimpleNamespace(train=range(800)), SimpleNamespace(num_processes=processes)
    speeds = Speed(1.0, 0.0), Speed(0.25, 0.0)
    assert replaying._pays(TrainPart(steps=steps), work, chosen, machine, *speeds, 75.0, 0.0) is pays


CNN = """
import torch
from torch import nn
from smidgen.tasks.pieces import Pieces

def rows(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    return [(image, (image[:, :4].mean() > image[:, 4:].mean()).long()) for image in images]

def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 2))

def make():
    return Pieces(model=net, train=rows(120), loss=nn.functional.cross_entropy, head="8", augment=AUGMENT)
"""


def run_custom(tmp_path, augment, **train):
    (tmp_path / "mine.py").write_text(CNN.replace("AUGMENT", augment))
    usual = {"steps": 12, "batch": 8, "learning_rate": 0.01, "evaluate_every": 4, "precision": "fp32"}
    recipe = {"task": f"{tmp_path / 'mine.py'}:make", "out": str(tmp_path / "out"), "train": usual | train}
    recipe["method"] = {"name": "lora", "targets": ["6"], "rank": 2}
    out = tune(Recipe.model_validate(recipe), resume=False, fresh=True, console=Console(file=io.StringIO()))
    report = json.loads((out / "report.json").read_text())
    entry = next(entry for entry in report["plan"] if entry["setting"] == "replay")
    return entry, [value for _, value in report["curves"]["valid loss"]]


def test_a_cnn_of_one_s_own_replays_from_its_last_frozen_layer(tmp_path):
    (off, expected), (on, losses) = (run_custom(tmp_path, "None", replay=place) for place in ("off", "memory"))
    assert (off["value"], on["value"]) == ("off", "memory")
    assert on["why"].startswith("what is frozen up to body.5 runs once")
    assert losses == pytest.approx(expected, abs=1e-5)


def test_rows_that_are_disturbed_while_training_are_computed(tmp_path):
    augment = "lambda batch: {**batch, 'inputs': batch['inputs'] + torch.rand_like(batch['inputs'])}"
    entry, _ = run_custom(tmp_path, augment, replay="memory")
    assert entry["why"] == "training rows are disturbed at random, another way each time"


@pytest.mark.parametrize("task", ["causal_lm", "packed", "embeddings", "token_classification"])
def test_other_tasks_replay_too(start, tmp_path, task):
    texts = [text for text, _ in reviews(60)]
    path, recipe = tmp_path / "rows.jsonl", {"task": task}
    if task in ("causal_lm", "packed"):
        recipe = {"task": "causal_lm", "model": str(tiny_lm(tmp_path / "lm"))}
    if task == "packed":
        rows = [{"text": text} for text in texts]
        recipe["task"] = {"name": "causal_lm", "max_length": 32}
    elif task == "causal_lm":
        rows = [{"prompt": text[:12], "completion": text[12:]} for text in texts]
    elif task == "embeddings":
        rows = [{"query": text, "document": text[::-1][:15]} for text in texts]
    else:
        words = [text.split() for text in texts]
        rows = [{"tokens": row, "tags": ["good" if word in GOOD else "other" for word in row]} for row in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    off = start(out=str(tmp_path / "off"), data=str(path), train={**TOP, "replay": "off"}, **recipe)
    on = start(data=str(path), train={**TOP, "replay": "memory"}, **recipe)
    assert on.plan["replay"] == "memory", why(on)
    same_to_rounding(on, off)


def test_pairs_of_texts_replay_too(start, tmp_path):
    rows = [(text, text[::-1][:9], label) for text, label in reviews(60)]
    data = write_csv(tmp_path / "pairs.csv", rows, ("text", "text_pair", "label"))
    off = start(out=str(tmp_path / "off"), data=str(data), train={**TOP, "replay": "off"})
    on = start(data=str(data), train={**TOP, "replay": "memory"})
    assert on.plan["replay"] == "memory", why(on)
    same_to_rounding(on, off)
