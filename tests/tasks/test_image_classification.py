"""Image classification: rows to batches, the model, norms with statistics of their own, and using a result."""

import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from smidgen import attach
from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError
from smidgen.data.images import Fit
from smidgen.data.lazy import Lazy
from smidgen.data.table import Table
from smidgen.methods.batchnorm_tuning import BatchNormTuning
from smidgen.methods.lora import LoRA
from smidgen.recipes.run import tune
from smidgen.recipes.schema import Recipe
from smidgen.tasks.base import Asked
from smidgen.tasks.image_classification import ImageClassification, ImageClassificationSettings
from smidgen.tasks.images import pixels as pixels_module
from smidgen.tasks.images.image_models import ImageClassifier
from smidgen.tasks.images.pixels import Pixels
from smidgen.tasks.models import locate

MODEL = """
from torch import nn

def make():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )
    model.pretrained_cfg = {"input_size": (3, 12, 12), "mean": (0.4,) * 3, "std": (0.2,) * 3}
    return model
"""


def png(level: int, side: int = 12) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level, level // 2, 255 - level)).save(file, "PNG")
    return file.getvalue()


def rows(count=12, side=12, **columns) -> Table:
    columns = {
        "image": [{"bytes": png(10 * i, side), "path": f"{i}.png"} for i in range(count)],
        "label": ["cat" if i % 2 else "dog" for i in range(count)],
        **columns,
    }
    return Table(columns, [f"t.parquet row {i + 1}" for i in range(count)])


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    model = locate(f"{tmp_path / 'model.py'}:make")
    return Asked(model=model, plan=Plan(), device=torch.device("cpu"), seed=0)


def made(asked, table=None, **said):
    table = table or rows()
    task = ImageClassification.understand({"train": table}, ImageClassificationSettings(**said), asked)
    model = task.build(asked)
    task.settle(model, table, asked)
    return task, model, table


def test_the_plan_says_what_was_chosen_and_why(asked):
    task, _, _ = made(asked)
    plan = {name: (value, why) for name, value, why in asked.plan.entries}
    assert plan["image column"][0] == "image"
    assert plan["kind"][0] == "binary"
    assert plan["image_size"] == ("12", "its pretrained_cfg")
    assert plan["features"] == ("6", "what its classifier 7 is given")
    assert plan["augment"][0] == "shift"
    assert plan["flip"][0] == "True"
    assert plan["batch statistics"][0] == "frozen"
    chosen = {"kind": "binary", "image_size": 12, "augment": "shift", "flip": True}
    assert task.resolved_settings() == chosen
    assert ImageClassificationSettings(**chosen)
    assert task.resolved_columns() == {"image": "image", "label": "label"}


def test_large_images_are_cropped_and_what_is_said_stands(asked):
    assert made(asked, rows(side=80))[0].augmented == "crop"
    task, _, table = made(asked, augment="off", image_size=20)
    batch = task.collate(task.encode(table), [0])
    assert batch["pixels"].shape == (1, 3, 20, 20)
    assert task.augment(batch) is batch


def test_folders_are_classes_also_where_they_are_numbers(asked):
    table = rows(folder=["0.5" if i % 2 else "1.5" for i in range(12)])
    table = Table({name: table.columns[name] for name in ("image", "folder")}, table.origins)
    task = made(asked, table)[0]
    assert (task.labels.kind, task.labels.names) == ("binary", ("0.5", "1.5"))
    assert not made(asked, rows(label=[str(i % 3) for i in range(12)]))[0].flips


def test_bad_rows_are_found_before_the_run(asked):
    table = rows()
    task = made(asked, table)[0]
    table = rows(label=["cat", "dog", "horse", "cat"] * 3)
    table.columns["image"][1] = "gone.png"
    table.columns["image"][2] = b"no image"
    problems = task.check(table)
    assert sorted(problems) == [1, 2, 6, 10]
    assert problems[1] == "there is no file gone.png"
    assert "no image that can be read" in problems[2]
    assert "horse" in problems[2]


def test_images_become_bytes_in_memory_or_are_decoded_by_the_batch(asked):
    task, _, table = made(asked)
    kept = task.encode(table)
    assert kept.inputs[0]["pixels"].dtype == torch.uint8
    assert kept.lengths == [1] * 12
    task.pixels.room = 0
    later = task.encode(table)
    assert kept.inputs.pixels is not None
    assert later.inputs.pixels is None
    for name in ("pixels", "targets"):
        assert torch.equal(task.collate(kept, [3, 1])[name], task.collate(later, [3, 1])[name])
    assert task.collate(kept.select([5, 3]), [1])["targets"].tolist() == [0]


def test_of_images_that_stay_in_their_file_those_of_the_batch_are_read_and_no_others(asked):
    task, _, table = made(asked)
    wanted = []

    def read(numbers):
        wanted.extend(numbers)
        return [table.columns["image"][i] for i in numbers]

    lazy = Table({**table.columns, "image": Lazy(read, range(12))}, table.origins)
    task.pixels.room = 0
    examples = task.encode(lazy)
    assert wanted == []
    batch = task.collate(examples.select([7, 5, 3]), [2, 0])
    assert wanted == [3, 7]
    assert torch.equal(batch["pixels"], task.collate(task.encode(table), [3, 7])["pixels"])


def test_a_damaged_image_that_is_not_kept_is_named_by_its_row(asked):
    task, _, table = made(asked)
    table.columns["image"][4] = png(7)[:50]
    task.pixels.room = 0
    examples = task.encode(table)
    with pytest.raises(DataError, match=r"1 of 2 images are damaged.*\n  t.parquet row 5: it cannot be decoded"):
        task.collate(examples, [3, 4])


def test_rows_have_the_same_digest_whether_images_are_kept_or_not_and_another_where_one_changes(asked):
    task, _, table = made(asked)
    kept = task.encode(table)
    task.pixels.room = 0
    later = task.encode(table)
    digest = kept.inputs.sha256()
    assert later.inputs.sha256() == digest
    assert kept.select([3, 1]).inputs.sha256() == later.select([3, 1]).inputs.sha256() != digest
    table.columns["image"][1] = png(200)
    assert task.encode(table).inputs.sha256() != digest
    larger, _, table = made(asked, image_size=20)
    assert larger.encode(table).inputs.sha256() != digest


def test_decoded_images_take_a_quarter_of_the_free_memory_and_2_gb_at_most(monkeypatch):
    fit = Fit(height=12, width=12)
    for free, room in ((4 * 12 * 432, 12 * 432), (4 * 12 * 432 - 4, 12 * 432 - 1), (1 << 40, 2 << 30), (None, 2 << 30)):
        monkeypatch.setattr(pixels_module, "free_memory", lambda device, free=free: free)
        pixels = Pixels()
        found = pixels.rows(rows().columns["image"], rows().origins, fit)
        assert (found.pixels is not None) is (room >= 12 * 432)
        assert pixels.room == (room - 12 * 432 if room >= 12 * 432 else room)


def test_augmented_batches_are_numbers_in_0_to_1_and_keep_their_targets(asked):
    task, model, table = made(asked)
    batch = task.collate(task.encode(table), [0, 1, 2])
    new = task.augment(batch)
    assert new["pixels"].shape == batch["pixels"].shape
    assert new["pixels"].dtype == torch.float32
    assert torch.equal(new["targets"], batch["targets"])
    assert model(new).shape == (3, 2)


def test_pixels_are_normalised_in_the_model(asked):
    task, model, table = made(asked)
    batch = task.collate(task.encode(table), [0, 1])
    model.eval()
    x = (batch["pixels"] / 255 - 0.4) / 0.2
    assert torch.allclose(model.features(batch), model.body[:7](x), atol=1e-6)
    assert torch.allclose(model({"pixels": batch["pixels"] / 255}), model(batch), atol=1e-6)


def test_the_same_model_is_built_each_time(asked):
    task, _, _ = made(asked)
    one, two = task.build(asked), task.build(asked)
    assert torch.equal(one.head.weight, two.head.weight)


def test_statistics_are_frozen_unless_the_method_keeps_its_own(asked):
    for statistics in (None, "frozen", "adapted"):
        task, model, table = made(asked)
        method = LoRA(rank=2) if statistics is None else BatchNormTuning(statistics=statistics)
        adapters = attach(model.body, method)
        adapters.freeze_base()
        of_base = {name: b.clone() for name, b in model.body.named_buffers() if "smidgen" not in name}
        own = {name: b for name, b in model.body.named_buffers() if name.endswith("running_mean") and "smidgen" in name}
        before = {name: b.clone() for name, b in own.items()}
        model.train()
        model(task.collate(task.encode(table), range(8)))
        assert all(torch.equal(model.body.get_buffer(name), b) for name, b in of_base.items())
        assert bool(own) == (statistics == "adapted")
        assert not any(torch.equal(own[name], b) for name, b in before.items())
        after = {name: b.clone() for name, b in own.items()}
        model.eval()
        model(task.collate(task.encode(table), range(8)))
        assert all(torch.equal(own[name], b) for name, b in after.items())


def test_trials_before_a_run_leave_statistics_alone(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    for number in range(24):
        folder = tmp_path / "images" / ("dark" if number % 2 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(5 * number + 100 * (number % 2)))
    recipe = {
        "model": f"{tmp_path / 'model.py'}:make",
        "data": {"train": str(tmp_path / "images")},
        "task": "image_classification",
        "method": {"name": "batchnorm_tuning", "statistics": "adapted"},
        "train": {"steps": 3, "batch": 4},
        "out": str(tmp_path / "out"),
    }
    said = io.StringIO()
    out = tune(Recipe.model_validate(recipe), resume=False, fresh=False, console=Console(file=said))
    assert "leaves the output as it was" in said.getvalue()
    saved = load_file(out / "adapter_model.safetensors")
    assert saved["base_model.model.1.num_batches_tracked"] <= 3  # the best step's: no trial is counted


def test_equal_images_stay_on_one_side_and_are_told_of(asked):
    table = rows(20)
    for i in range(10):
        table.columns["image"][10 + i] = {"bytes": table.columns["image"][i]["bytes"], "path": "copy.png"}
        table.columns["label"][10 + i] = table.columns["label"][i]
    task = made(asked, table)[0]
    kept, held = task.hold_out(table, 0.3, 0)
    assert task.remarks(table.select(kept), table.select(held)) == []
    assert "1 of 1 test images stand in the training rows" in task.remarks(table, table.select([3]))[0]


@pytest.mark.parametrize(
    ("kind", "labels", "outputs"),
    [
        ("multiclass", ["a", "b", "c"] * 4, 3),
        ("multilabel", [["a"], ["a", "b"], []] * 4, 2),
        ("regression", [0.5, 1.25, 4.0] * 4, 1),
    ],
)
def test_every_kind_of_label_trains(asked, kind, labels, outputs):
    task, model, table = made(asked, rows(label=labels), kind=kind)
    batch = task.collate(task.encode(table), range(12))
    loss, count = task.loss(model(task.augment(batch)), batch)
    loss.backward()
    assert count == 12
    assert model.head.weight.grad.abs().sum() > 0
    assert model.head.out_features == outputs
    assert set(task.score(model(batch).detach(), batch["targets"])) == set(task.metrics)


def test_a_saved_task_reads_other_files_in_the_same_way(asked, tmp_path):
    task, _, table = made(asked, image_size=10)
    again = ImageClassification.from_description(json.loads(json.dumps(task.describe())), asked)
    assert again.seen.fit == task.seen.fit
    assert (again.seen.mean, again.seen.std) == (task.seen.mean, task.seen.std)
    assert isinstance(again.build(asked), ImageClassifier)
    Image.new("RGB", (30, 20)).save(tmp_path / "new.png")
    given = again.table_of([str(tmp_path / "new.png")])
    again.rows_for(given, labelled=False)
    assert again.check(given) == {}
    assert again.collate(again.encode(given), [0])["pixels"].shape == (1, 3, 10, 10)
    line = again.predicted(given, torch.tensor([[0.0, 2.0]]))[0]
    assert line == {"image": str(tmp_path / "new.png"), "prediction": "dog", "probability": 0.8808}
    other = Table({"picture": table.columns["image"], "class": table.columns["label"]}, table.origins)
    again.rows_for(other, labelled=True)
    assert again.resolved_columns() == {"image": "picture", "label": "class"}
    with pytest.raises(KeyError):
        ImageClassification.from_description({"kind": "binary"}, asked)


def test_damaged_images_stop_before_the_run(asked):
    task, _, table = made(asked)
    table.columns["image"][4] = png(7)[:50]
    assert task.check(table) == {}
    with pytest.raises(DataError, match=r"1 of 12 images are damaged.*\n  t.parquet row 5: it cannot be decoded"):
        task.encode(table)


def test_a_merged_model_of_yours_is_written_as_its_state(asked, tmp_path):
    from safetensors.torch import load_file

    task, model, _ = made(asked)
    task.save_body(model.body, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(model.body.state_dict())


def test_a_photo_that_lies_on_its_side_is_seen_upright(asked):
    upright = Image.new("RGB", (12, 24), "white")
    upright.paste("black", (0, 0, 12, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif)
    table = rows(image=[file.getvalue()] * 12)
    task = made(asked, table)[0]
    pixels = task.collate(task.encode(table), [0])["pixels"][0]
    assert pixels[:, :5].max() < 30
    assert pixels[:, 7:].min() > 225
