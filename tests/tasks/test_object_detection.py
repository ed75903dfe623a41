"""The task of object detection: from scenes and a small detector to answers, scores and back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from smidgen import attach
from smidgen.core.errors import DataError, ModelError, RecipeError
from smidgen.data.boxes import Box
from smidgen.methods.batchnorm_tuning import BatchNormTuning
from smidgen.tasks.base import Asked
from smidgen.tasks.images.boxes import hits
from smidgen.tasks.images.disturbed import GREY, disturbed
from smidgen.tasks.images.letterbox import Letterbox
from smidgen.tasks.models import locate
from smidgen.tasks.object_detection import ObjectDetection, ObjectDetectionSettings

MAKER = f"{Path(__file__).with_name('images') / 'test_detectors.py'}:Yolo"


class Plan:
    """Notes what was decided."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def decide(self, name: str, said: Any, chosen: Any, why: str) -> Any:
        self.entries[name] = chosen if said is None else said
        return self.entries[name]


def asked(metric: str | None = None, **columns: str) -> Asked:
    return Asked(model=locate(MAKER), plan=Plan(), device=torch.device("cpu"), seed=0, metric=metric, columns=columns)


def scenes(root: Path, names: str = "[old 1, new]", count: int = 6) -> Path:
    """Red squares, 40 x 20 pixels."""
    for i in range(count):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "labels").mkdir(exist_ok=True)
        image = Image.new("RGB", (40, 20), (20 * i, 90, 90))
        ImageDraw.Draw(image).rectangle((10, 5, 19, 14), "red")
        image.save(root / "images" / f"{i}.png")
        (root / "labels" / f"{i}.txt").write_text(f"{i % 2} 0.375 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    return root


def understood(root: Path, metric: str | None = None, **settings: Any) -> tuple[ObjectDetection, Any, Asked]:
    wanted = asked(metric)
    tables, problems = ObjectDetection.read(str(root), ObjectDetectionSettings())
    assert problems == []
    settings = {"image_size": 64, **settings}
    return ObjectDetection.understand(tables, ObjectDetectionSettings(**settings), wanted), tables["train"], wanted


def test_classes_that_the_detector_lacks_grow_behind_its_own(tmp_path: Path) -> None:
    task, _, wanted = understood(scenes(tmp_path))
    assert task.names == ["old 0", "old 1", "new"]
    assert task.own == 2
    assert task.metrics == ("map50", "map50_95", "map50 old", "map50 new")
    assert wanted.plan.entries["classes"] == "2 old, 1 new"  # type: ignore[attr-defined]
    assert "Before tuning it cannot name them" in task.notes[0]
    assert task.notes[1].startswith("No training box of old 0:")
    model: Any = task.build(wanted)
    assert model.names == task.names
    assert model.taught.tolist() == [False, True, True]
    again = task.build(wanted)
    assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), again.head.parameters(), strict=True))


def test_the_plan_says_once_how_many_polygons_are_read_as_boxes(tmp_path: Path) -> None:
    assert "polygons" not in understood(scenes(tmp_path))[2].plan.entries  # type: ignore[attr-defined]
    for i in range(2):
        (tmp_path / "labels" / f"{i}.txt").write_text("0 .25 .25 .5 .25 .5 .75 .25 .75\n")
    task, table, wanted = understood(tmp_path)
    assert wanted.plan.entries["polygons"] == "2 read as boxes"  # type: ignore[attr-defined]
    assert task.encode(table).targets[0].tolist() == [[1, 16, 24, 32, 40]]


def test_the_plan_says_what_becomes_of_batch_statistics_and_a_method_may_keep_its_own(tmp_path: Path) -> None:
    task, table, wanted = understood(scenes(tmp_path))
    model: Any = task.build(wanted)
    task.settle(model, table, wanted)
    assert wanted.plan.entries["batch statistics"] == "frozen"  # type: ignore[attr-defined]
    for statistics in ("frozen", "adapted"):
        model = task.build(wanted)
        adapters = attach(model.body, BatchNormTuning(statistics=statistics))
        adapters.freeze_base()
        before = {name: buffer.clone() for name, buffer in model.body.named_buffers()}
        model.train()
        model(task.collate(task.encode(table), range(6)))
        moved = [name for name, buffer in model.body.named_buffers() if not torch.equal(buffer, before[name])]
        assert bool(moved) is (statistics == "adapted")
        assert all("smidgen" in name for name in moved)


def test_without_new_classes_there_is_no_head_and_no_old_and_new(tmp_path: Path) -> None:
    task, _, wanted = understood(scenes(tmp_path, "[old 0, old 1]"))
    assert task.metrics == ("map50", "map50_95")
    assert list(task.build(wanted).head.parameters()) == []
    assert task.notes == []


def test_old_classes_that_nobody_marked_are_remembered(tmp_path: Path) -> None:
    task, _, wanted = understood(scenes(tmp_path))
    assert wanted.plan.entries["remember"] is True  # type: ignore[attr-defined]
    assert task.build(wanted).remembers is True
    assert task.resolved_settings()["remember"] is True
    task, _, wanted = understood(tmp_path, remember=False)
    assert task.build(wanted).remembers is False


def test_where_all_are_marked_there_is_nothing_to_remember(tmp_path: Path) -> None:
    scenes(tmp_path, "[old 0, old 1]")
    task, _, wanted = understood(tmp_path)
    assert task.build(wanted).remembers is task.resolved_settings()["remember"] is False
    with pytest.raises(RecipeError, match=r"task\.remember is true: all old classes are marked; leave it out"):
        understood(tmp_path, remember=True)


def test_frames_of_one_video_stay_on_one_side(tmp_path: Path) -> None:
    scenes(tmp_path, count=12)
    for i in range(12):
        for folder, suffix in (("images", "png"), ("labels", "txt")):
            (tmp_path / folder / f"{i}.{suffix}").rename(tmp_path / folder / f"clip {'abcd'[i % 4]}_{i:04}.{suffix}")
    tables, _ = ObjectDetection.read(str(tmp_path), ObjectDetectionSettings())
    settings, wanted = ObjectDetectionSettings(image_size=64), asked(group="video")
    task = ObjectDetection.understand(tables, settings, wanted)
    assert wanted.plan.entries["group column"] == "video"  # type: ignore[attr-defined]
    assert task.split_words == 'by class, seeded, rows of one "video" kept together'
    kept, held = task.hold_out(tables["train"], 0.25, 0)
    videos = tables["train"].column("video")
    assert {videos[i] for i in kept}.isdisjoint({videos[i] for i in held})
    assert len(held) == 6  # of each class one of its two videos
    alike = ObjectDetection.understand(tables, settings, asked())
    assert alike.split_words == "by class, seeded, equal images kept together"
    assert len(set(alike.groups(tables["train"]) or ())) == 12
    with pytest.raises(
        DataError, match=r'no column "vidoe". Did you mean "video"\? Columns: image, boxes, folder, video'
    ):
        ObjectDetection.understand(tables, settings, asked(group="vidoe"))
    tables["train"].columns["video"][3] = ""
    assert task.check(tables["train"]) == {3: "column \"video\": '' is no group; it must be a name or number"}


def test_images_are_letterboxed_and_boxes_with_them(tmp_path: Path) -> None:
    task, table, _ = understood(scenes(tmp_path))
    examples = task.encode(table)
    batch = task.collate(examples, [0, 3])
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["image"][0, :, 5, 30].tolist() == pytest.approx([GREY / 255] * 3)  # beside the image
    assert batch["targets"][:, 0].tolist() == [[1, 16, 24, 32, 40], [2, 16, 24, 32, 40]]
    inside = batch["image"][0, :, 28:36, 20:28]
    assert inside[0].min() > 0.9  # the red square is where the box is
    assert inside[1].max() < 0.1
    assert Letterbox.of((20, 40), 64) == Letterbox((20, 40), top=16, left=0, height=32, width=64)


def test_images_that_are_not_kept_come_to_the_same_batches(tmp_path: Path) -> None:
    task, table, _ = understood(scenes(tmp_path))
    Image.new("RGB", (20, 90), "blue").save(table.column("image")[3])  # another shape
    kept = task.encode(table)
    task.pixels.room = 0
    later = task.encode(table)
    assert kept.inputs.pixels is not None  # type: ignore[attr-defined]
    assert later.inputs.pixels is None  # type: ignore[attr-defined]
    for some, same in ((kept, later), (kept.select([5, 3, 0]), later.select([5, 3, 0]))):
        batches = [task.collate(examples, [2, 1]) for examples in (some, same)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("image", "targets"))


def test_a_photo_that_lies_on_its_side_is_letterboxed_upright_and_boxes_refer_to_that(tmp_path: Path) -> None:
    root = scenes(tmp_path, count=1)
    (root / "images" / "0.png").unlink()
    upright = Image.new("RGB", (20, 40), (90, 90, 90))
    ImageDraw.Draw(upright).rectangle((5, 20, 14, 39), "red")  # its lower middle
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera stored it turned to the left
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "images" / "0.jpg", exif=exif, quality=100, subsampling=0)
    (root / "labels" / "0.txt").write_text("0 0.5 0.75 0.5 0.5\n")
    task, table, _ = understood(root)
    batch = task.collate(task.encode(table), [0])
    assert batch["targets"][0].tolist() == [[1, 24, 32, 40, 64]]
    image = batch["image"][0]
    assert image[:, 30, 10].tolist() == pytest.approx([GREY / 255] * 3)  # it is high and narrow now
    assert (image[0, 34:62, 26:38] > 0.9).all()
    assert (image[1, 34:62, 26:38] < 0.1).all()
    answers = torch.full((1, 1, 7), -1.0)
    answers[0, 0] = torch.tensor([24.0, 32, 40, 64, 0.9, 1, 0])
    assert task.predicted(table, answers)[0]["boxes"][0]["box"] == [5.0, 20.0, 15.0, 40.0]


def test_training_and_answers_go_through_and_the_right_boxes_score_1(tmp_path: Path) -> None:
    task, table, wanted = understood(scenes(tmp_path))
    model, examples = task.build(wanted).train(), task.encode(table)
    batch = task.collate(examples, range(6))
    outputs = model(task.augment(batch))
    loss, count = task.loss(outputs, batch)
    assert loss.requires_grad
    assert count == 6
    with torch.no_grad():
        answers = task.answer(model.eval()(batch), batch)
    assert answers.shape == (6, 100, 7)
    assert task.score(answers, examples.targets)["map50"] < 0.5

    perfect = torch.full((6, 100, 7), -1.0)
    perfect[:, 0, :4], perfect[:, 0, 4], perfect[:, 0, 5] = examples.targets[:, 0, 1:], 0.9, examples.targets[:, 0, 0]
    perfect[..., 6] = hits(perfect[..., :6], examples.targets).float()
    assert task.score(perfect, examples.targets) == dict.fromkeys(task.metrics, pytest.approx(1.0))
    perfect[3, 0, 6] = 0
    scores = task.score(perfect, examples.targets)
    assert scores["map50 old"] == pytest.approx(1.0)
    assert scores["map50 new"] < 1.0
    assert scores["map50"] == pytest.approx((scores["map50 old"] + scores["map50 new"]) / 2)

    perfect[3, 0, 6] = 1023
    lines = task.contrasts(table, examples.targets, torch.full_like(perfect, -1.0), perfect)
    assert len(lines) == 6
    assert (lines[0].truth, lines[0].base, lines[0].tuned, lines[0].better) == (
        "1 old 1",
        "nothing",
        "1 old 1",
        "tuned",
    )
    shown = task.predicted(table, perfect)[0]
    assert shown["boxes"] == [{"class": "old 1", "score": 0.9, "box": [10.0, 5.0, 20.0, 15.0]}]  # of the image itself
    json.dumps(shown)


def test_a_score_without_true_boxes_is_not_a_number(tmp_path: Path) -> None:
    task, _, _ = understood(scenes(tmp_path))
    score = task.score(torch.full((6, 100, 7), -1.0), torch.full((6, 0, 5), -1.0))
    assert all(math.isnan(value) for value in score.values())


def test_a_description_brings_the_task_back(tmp_path: Path) -> None:
    task, table, wanted = understood(scenes(tmp_path), metric="map50_95")
    description = json.loads(json.dumps(task.describe()))
    again = ObjectDetection.from_description(description, wanted)
    assert again.describe() == task.describe()
    assert torch.equal(again.encode(table).targets, task.encode(table).targets)
    model: Any = again.build(wanted)
    assert model.names == task.names
    with pytest.raises(ValueError, match="names, own and image_size"):
        ObjectDetection.from_description({**description, "own": 7}, wanted)
    other = ObjectDetection.from_description({**description, "names": ["x", "y", "new"]}, wanted)
    with pytest.raises(ModelError, match=r"has the classes old 0, old 1 .*; the tuned model grew on one with x, y"):
        other.build(wanted)


def test_wrong_rows_and_settings_are_named(tmp_path: Path) -> None:
    task, table, _ = understood(scenes(tmp_path))
    table.column("boxes")[1].append(Box("bird", 0.5, 0.5, 0.1, 0.1))
    Path(table.column("image")[2]).write_bytes(b"no image")
    problems = task.check(table)
    assert set(problems) == {1, 2}
    assert problems[1] == "bird: no class of the model, and in no training image"
    assert "is no image that can be read" in problems[2]
    with pytest.raises(RecipeError, match=r"task\.image_size is 60; for .* it is a multiple of 8, such as 64"):
        understood(scenes(tmp_path), image_size=60)
    with pytest.raises(RecipeError, match='"accuracy" is no metric'):
        understood(scenes(tmp_path), metric="accuracy")
    for file in (tmp_path / "labels").glob("*.txt"):
        file.write_text("")
    with pytest.raises(DataError, match="no training image has a box"):
        understood(tmp_path)


def test_splits_keep_equal_images_together_and_rare_classes_on_both_sides(tmp_path: Path) -> None:
    task, table, _ = understood(scenes(tmp_path, count=20))
    assert task.strata(table) == ["old 1", "new"] * 10
    kept, held = task.hold_out(table, 0.2, 0)
    assert {task.strata(table)[i] for i in held} == {"old 1", "new"}  # type: ignore[index]
    assert len(kept) + len(held) == 20
    assert len(set(task.groups(table) or [])) == 14  # from 13 on the colours are cut at 255


def test_images_on_the_command_line_are_rows_without_boxes(tmp_path: Path) -> None:
    task, table, _ = understood(scenes(tmp_path))
    given = task.table_of(table.column("image")[:2])
    assert task.encode(given).targets.shape == (2, 0, 5)


def test_boxes_follow_their_image_when_it_is_disturbed() -> None:
    images = torch.zeros(16, 3, 64, 64)
    targets = torch.full((16, 2, 5), -1.0)
    for i in range(16):
        x, y = 8 + i, 30 - i
        images[i, :, y : y + 20, x : x + 24] = 1
        targets[i, 0] = torch.tensor([3, x, y, x + 24, y + 20])
    moved, boxes = disturbed(images, targets)
    assert (boxes[:, 1] == -1).all()
    assert not torch.equal(boxes, targets)
    for i in range(16):
        bright = (moved[i].mean(0) > 0.6).nonzero()
        low, high = bright.amin(0).flip(0), bright.amax(0).flip(0) + 1
        assert boxes[i, 0, 0] == 3
        torch.testing.assert_close(torch.cat([low, high]).float(), boxes[i, 0, 1:], atol=1.0, rtol=0)


def test_a_box_that_is_moved_out_of_the_picture_goes() -> None:
    targets = torch.tensor([[[0.0, 0, 0, 2, 2]]]).repeat(200, 1, 1)
    _, boxes = disturbed(torch.zeros(200, 3, 32, 32), targets)
    there = boxes[:, 0, 0] >= 0
    assert 0 < int(there.sum()) < 200
    assert (boxes[~there] == -1).all()
    assert (boxes[there][..., 1:] >= 0).all()


@pytest.mark.parametrize(("method", "rate"), [(None, "0.0005"), ("lora", "0.0005")])
def test_a_detector_is_tuned_by_its_most_important_weights_where_nobody_names_a_method(
    tmp_path: Path, method: str | None, rate: str
) -> None:
    from smidgen.auto.plan import Plan
    from smidgen.recipes.choose import choose, method_of
    from smidgen.recipes.load import recipe_from
    from smidgen.recipes.prepare import prepare

    said = {"model": MAKER, "data": str(scenes(tmp_path)), "task": {"name": "object_detection", "image_size": 64}}
    recipe = recipe_from({**said, **({"method": method} if method else {})})
    plan = Plan()
    work = prepare(recipe, plan, torch.device("cpu"), 0)
    part, rates = method_of(recipe, work, plan)
    choose(recipe.train, rates, work, plan, 0)
    entries = {name: (value, why) for name, value, why in plan.entries}
    assert entries["learning_rate"][0] == rate
    if method:
        assert part.name == "lora"
        return
    assert part.settings["targets"] == ["model.2.cv2.*", "model.2.cv3.*"]
    assert (part.settings["budget"], part.settings["by"], part.settings["grain"]) == (0.05, "fisher", "tensors")
    assert entries["method"][0] == "selective"
    assert "the detector's own weights" in entries["method"][1]
    assert entries["targets"][1] == "a twentieth of the weights, in neck and head"
