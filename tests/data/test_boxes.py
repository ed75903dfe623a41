"""Reading boxes: YOLO's folders and COCO's JSON, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from smidgen.core.errors import DataError
from smidgen.data.boxes import Box, read_boxes

COLUMNS = "a box has 5: class cx cy width height; a polygon 7, 9, 11 ...: class x1 y1 x2 y2 x3 y3 ..."


def picture(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 30, 200)).save(path)
    return path


def yolo(root: Path, labels: dict[str, str], part: str = "train", names: str = "[cat, dog]") -> Path:
    """A data set of YOLO; label texts by stem of image."""
    for stem, text in labels.items():
        picture(root / "images" / part / f"{stem}.png")
        label = root / "labels" / part / f"{stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)
    file = root / "data.yaml"
    file.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    (root / "images" / "val").mkdir(parents=True, exist_ok=True)
    return file


def coco(root: Path, name: str = "instances_train.json", **changed: Any) -> Path:
    picture(root / "a.png")
    said = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10]}],
    }
    file = root / name
    file.write_text(json.dumps(said | changed))
    return file


def test_lines_of_yolo_become_boxes_with_names(tmp_path: Path) -> None:
    tables, problems = read_boxes(str(yolo(tmp_path, {"a": "1 0.5 0.5 0.2 0.4\n\n0 .1 .1 .2 .2\n", "b": ""})))
    assert problems == []
    assert tables["train"].column("boxes") == [
        [Box("dog", 0.5, 0.5, pytest.approx(0.2), pytest.approx(0.4)), Box("cat", 0.1, 0.1, 0.2, 0.2)],
        [],
    ]
    assert tables["train"].where(0).endswith("images/train/a.png")


def test_names_may_be_a_mapping_and_validation_is_a_part(tmp_path: Path) -> None:
    yolo(tmp_path, {"c": "0 .5 .5 .2 .2"}, part="val")
    tables, _ = read_boxes(str(yolo(tmp_path, {"a": "1 .5 .5 .2 .2"}, names="{0: cat, 1: dog}")))
    assert {part: table.column("boxes")[0][0].name for part, table in tables.items()} == {
        "train": "dog",
        "valid": "cat",
    }


def test_folders_do_without_a_yaml(tmp_path: Path) -> None:
    yolo(tmp_path, {"a": "1 .5 .5 .2 .2"}).unlink()
    assert read_boxes(str(tmp_path))[0]["train"].column("boxes")[0][0].name == "1"
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert read_boxes(str(tmp_path))[0]["train"].column("boxes")[0][0].name == "dog"


def test_an_image_without_a_file_of_labels_has_no_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    assert read_boxes(str(tmp_path))[0]["train"].column("boxes") == [[]]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("2 .5 .5 .2 .2", "class 2 is out of range; there are 0 to 1"),
        ("-1 .5 .5 .2 .2", "class -1 is out of range; there are 0 to 1"),
        ("0.5 .5 .5 .2 .2", "class 0.5 is out of range; there are 0 to 1"),
        ("0 .5 .5 .2", f"it has 4 columns; {COLUMNS}"),
        ("0 .5 .5 .2 .2 .9", f"it has 6 columns; {COLUMNS}"),
        ("0 .1 .1 .5 .1 .5 .5 .1", f"it has 8 columns; {COLUMNS}"),
        ("0 .1 .1 .5 .1 .5 high", '"0 .1 .1 .5 .1 .5 high" is not 7 numbers'),
        ("0 .1 .1 nan .1 .5 .5", "the polygon has a corner that is no number"),
        ("0 .1 .1 .5 .1 1.5 .5", "the box reaches from 0.1, 0.1 to 1.5, 0.5, outside of [0, 1]"),
        ("0 .1 .1 .5 .1 .9 .1", "the box is 0.8 wide and 0 high; both are to be above 0"),
        ("2 .1 .1 .5 .1 .5 .5", "class 2 is out of range; there are 0 to 1"),
        ("0 .5 .5 .2 wide", '"0 .5 .5 .2 wide" is not five numbers'),
        ("0 .95 .5 .2 .2", "the box reaches from 0.85, 0.4 to 1.05, 0.6, outside of [0, 1]"),
        ("0 50 50 20 20", "the box reaches from 40, 40 to 60, 60, outside of [0, 1]"),
        ("0 nan .5 .2 .2", "the box reaches from nan, 0.4 to nan, 0.6, outside of [0, 1]"),
        ("0 .5 .5 0 .2", "the box is 0 wide and 0.2 high; both are to be above 0"),
        ("nan .5 .5 .2 .2", "class nan is out of range; there are 0 to 1"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    tables, problems = read_boxes(str(yolo(tmp_path, {"a": f"0 .5 .5 .2 .2\n{line}\n", "b": "0 .5 .5 .2 .2"})))
    assert [str(problem) for problem in problems] == [f"{tmp_path}/labels/train/a.txt:2: {what}"]
    assert len(tables["train"]) == 1  # the other image


def test_rounding_may_carry_a_box_a_little_over_the_edge(tmp_path: Path) -> None:
    box = read_boxes(str(yolo(tmp_path, {"a": "0 .901 .5 .2 .2"})))[0]["train"].column("boxes")[0][0]
    assert box.cx + box.width / 2 == pytest.approx(1.0)


def test_of_a_polygon_the_bounding_box_is_taken(tmp_path: Path) -> None:
    lines = "1 .2 .1 .6 .3 .4 .9\n0 .5 .5 .2 .2\n0 .1 .2 .3 .2 .3 .8 .1 .8\n"  # three corners, a box, four corners
    tables, problems = read_boxes(str(yolo(tmp_path, {"a": lines})))
    assert problems == []
    boxes = tables["train"].column("boxes")[0]
    assert [(box.name, box.is_outline) for box in boxes] == [("dog", True), ("cat", False), ("cat", True)]
    assert boxes[0][1:5] == pytest.approx((0.4, 0.5, 0.4, 0.8))
    assert boxes[2][1:5] == pytest.approx((0.2, 0.5, 0.2, 0.6))


def test_key_points_are_not_taken_for_polygons(tmp_path: Path) -> None:
    file = yolo(tmp_path, {"a": "0 .5 .5 .2 .2 .4 .4"})
    file.write_text(file.read_text() + "kpt_shape: [1, 2]\n")
    with pytest.raises(DataError, match=r"data\.yaml is of key points \(kpt_shape\).*keep the first 5 columns"):
        read_boxes(str(file))


def test_parts_are_found_beside_the_yaml_where_roboflow_writes_the_folder_above(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for part in ("train", "valid"):
        picture(root / part / "images" / "a.png")
        (root / part / "labels").mkdir()
        (root / part / "labels" / "a.txt").write_text("0 .5 .5 .2 .2")
    file = root / "data.yaml"
    file.write_text("train: ../train/images\nval: [../valid/images]\nnames: [cat]\n")
    tables, problems = read_boxes(str(file))
    assert problems == []
    assert [tables[part].where(0) for part in ("train", "valid")] == [
        str(root / part / "images" / "a.png") for part in ("train", "valid")
    ]
    written = picture(tmp_path / "train" / "images" / "b.png")  # as it is written it comes first
    assert read_boxes(str(file))[0]["train"].column("image")[0].endswith(written.name)
    file.write_text("train: ../gone/images\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"there is no file or folder .*/set/\.\./gone/images"):
        read_boxes(str(file))


def test_labels_without_an_image_are_named(tmp_path: Path) -> None:
    file = yolo(tmp_path, {"a": "0 .5 .5 .2 .2", "b": "0 .5 .5 .2 .2"})
    (tmp_path / "images/train/b.png").unlink()
    tables, problems = read_boxes(str(file))
    assert len(tables["train"]) == 1
    assert [str(problem) for problem in problems] == [
        f"{tmp_path}/labels/train/b.txt: there is no image of that name in {tmp_path}/images/train"
    ]


def test_a_file_may_list_the_images(tmp_path: Path) -> None:
    yolo(tmp_path, {"a": "0 .5 .5 .2 .2"})
    (tmp_path / "train.txt").write_text("images/train/a.png\nimages/train/gone.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nnames: [cat]\n")
    tables, problems = read_boxes(str(tmp_path))
    assert len(tables["train"]) == 1
    assert problems[0].where == f"{tmp_path}/train.txt:2"


def test_boxes_of_coco_are_pixels_from_the_corner(tmp_path: Path) -> None:
    tables, problems = read_boxes(str(coco(tmp_path)))
    assert problems == []
    assert tables["train"].column("boxes") == [[Box("cat", 0.5, 0.5, 0.5, 0.5)]]


def test_frames_of_one_video_are_known_by_folder_by_name_and_by_what_coco_says(tmp_path: Path) -> None:
    for name in ("street_0041", "street_0042", "park-7"):
        picture(tmp_path / "yolo" / "images" / "a" / f"{name}.png")
    picture(tmp_path / "yolo" / "images" / "b" / "000123.png")
    table = read_boxes(str(tmp_path / "yolo"))[0]["train"]
    assert [Path(folder).name for folder in table.column("folder")] == ["a", "a", "a", "b"]
    assert table.column("video") == ["park", "street", "street", ""]
    images = [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 20, "video_id": 3, "video": "the park", "crop": [1]},
        {"id": 8, "file_name": "a.png"},
    ]
    table = read_boxes(str(coco(tmp_path, images=images)))[0]["train"]
    assert table.names == ["image", "boxes", "folder", "video", "video_id"]
    assert table.column("video_id") == [3, None]
    assert table.column("video") == ["the park", None]  # what is said goes before what is read off the name


def test_parts_of_coco_are_named_by_their_files(tmp_path: Path) -> None:
    coco(tmp_path, "instances_train2017.json")
    coco(tmp_path, "instances_val2017.json")
    assert set(read_boxes(str(tmp_path))[0]) == {"train", "valid"}


def test_crowds_of_coco_are_left_out_and_sizes_are_read_from_the_image(tmp_path: Path) -> None:
    crowd = {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 20], "iscrowd": 1}
    box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 10]}
    file = coco(tmp_path, images=[{"id": 7, "file_name": "a.png"}], annotations=[crowd, box])
    assert read_boxes(str(file))[0]["train"].column("boxes") == [[Box("cat", 0.5, 0.25, 1.0, 0.5)]]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"category_id": 9}, "class 9 is out of range; there are 3"),
        ({"bbox": [10, 5, 20]}, "bbox has 3 numbers; it has 4: x y width height"),
        ({"bbox": [30, 5, 20, 10]}, "the box reaches from 0.75, 0.25 to 1.25, 0.75, outside of [0, 1]"),
        ({"image_id": 8}, "there is no image 8"),
        ({"bbox": "wide"}, "could not convert"),
    ],
)
def test_a_bad_annotation_of_coco_is_named(tmp_path: Path, changed: dict[str, Any], what: str) -> None:
    picture(tmp_path / "b.png")
    images = [{"id": i, "file_name": name, "width": 40, "height": 20} for i, name in ((7, "a.png"), (6, "b.png"))]
    entry = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10]} | changed
    _, problems = read_boxes(str(coco(tmp_path, images=images, annotations=[entry])))
    assert problems[0].where == f"{tmp_path}/instances_train.json annotation 1"
    assert what in problems[0].what


def test_a_missing_image_of_coco_is_named_once(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "gone.png"}]
    entry = {"id": 1, "image_id": 8, "category_id": 3, "bbox": [10, 5, 20, 10]}
    tables, problems = read_boxes(str(coco(tmp_path, images=images, annotations=[entry])))
    assert [str(p) for p in problems] == [
        f"{tmp_path}/instances_train.json image 8: there is no file gone.png, beside it or in images/"
    ]
    assert len(tables["train"]) == 1


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("data.yaml", "names: [cat]", "does not say where `train` is"),
        ("data.yaml", "train: images\nnames: {1: cat}", "the keys of `names` are \\[1\\]"),
        ("data.yaml", "train: [", "cannot be read"),
        ("data.yaml", "train: nowhere\nnames: [cat]", "there is no file or folder .*nowhere"),
        ("boxes.json", "{}", "is no JSON of COCO"),
        ("boxes.csv", "a,b", "is no data.yaml, no JSON of COCO and no image"),
    ],
)
def test_what_cannot_be_read_at_all_says_so(tmp_path: Path, name: str, text: str, what: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=what):
        read_boxes(str(tmp_path / name))


def test_a_place_that_is_not_there_or_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        read_boxes(str(tmp_path / "gone"))
    with pytest.raises(DataError, match="has no image that can be used"):
        read_boxes(str(tmp_path))


def lying(path: Path) -> Path:
    """A JPEG of 40 x 20 pixels whose EXIF says that it is to be turned: it is seen as 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (90, 30, 200)).save(path, exif=exif)
    return path


def test_boxes_of_coco_are_shares_of_the_upright_image(tmp_path: Path) -> None:
    lying(tmp_path / "a.jpg")
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 10, 10, 20]}
    for size in ({}, {"width": 20, "height": 40}):
        image = {"id": 7, "file_name": "a.jpg", **size}
        tables, problems = read_boxes(str(coco(tmp_path, images=[image], annotations=[annotation])))
        assert problems == []
        assert tables["train"].column("boxes") == [[Box("cat", 0.5, 0.5, 0.5, 0.5)]]


def test_boxes_drawn_on_an_image_that_was_not_turned_are_named(tmp_path: Path) -> None:
    lying(tmp_path / "a.jpg")
    picture(tmp_path / "b.png")
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 20},
        {"id": 8, "file_name": "b.png", "width": 40, "height": 20},
    ]
    tables, problems = read_boxes(str(coco(tmp_path, images=images)))
    assert len(tables["train"]) == 1
    assert "a.jpg is said to be 40 x 20, but is 20 x 40 once it is upright, as EXIF says" in problems[0].what
