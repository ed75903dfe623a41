"""Folders of images and tables of them: which rows there are, and by which class."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from smidgen.core.errors import DataError
from smidgen.data.image_columns import image_column, label_column
from smidgen.data.image_folder import read_images
from smidgen.data.table import Table


def put(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def test_the_folder_is_the_class(tmp_path):
    put(tmp_path / "dog" / "2.png", tmp_path / "cat" / "1.jpg", tmp_path / "cat" / "more" / "3.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("of no interest")
    put(tmp_path / ".hidden" / "x" / "1.png")
    parts, problems = read_images(str(tmp_path))
    assert problems == []
    assert list(parts) == ["train"]
    assert parts["train"].column("folder") == ["cat", "cat", "dog"]
    assert [path.rsplit("/", 1)[1] for path in parts["train"].column("image")] == ["1.jpg", "3.PNG", "2.png"]
    assert parts["train"].origins == parts["train"].column("image")


def test_parts_are_known_by_their_usual_names(tmp_path):
    for part, name in (("Train", "train"), ("val", "valid"), ("testing", "test")):
        put(tmp_path / part / "test tube" / "1.png", tmp_path / part / "cup" / "1.png")
        assert name in read_images(str(tmp_path))[0]
    parts, _ = read_images(str(tmp_path))
    assert list(parts) == ["train", "test", "valid"]
    assert parts["valid"].column("folder") == ["cup", "test tube"]


def test_classes_beside_parts_are_refused(tmp_path):
    put(tmp_path / "train" / "cat" / "1.png", tmp_path / "dog" / "1.png")
    with pytest.raises(DataError, match=r"parts \(train\) and others with images \(dog\)"):
        read_images(str(tmp_path))


def test_two_folders_of_one_part_are_refused(tmp_path):
    put(tmp_path / "val" / "cat" / "1.png", tmp_path / "valid" / "cat" / "1.png")
    with pytest.raises(DataError, match='several folders that mean "valid"'):
        read_images(str(tmp_path))


def test_images_beside_the_classes_are_problems_and_alone_they_have_no_class(tmp_path):
    put(tmp_path / "a" / "cat" / "1.png", tmp_path / "a" / "2.png", tmp_path / "b" / "3.png")
    _, problems = read_images(str(tmp_path / "a"))
    assert [problem.where for problem in problems] == [str(tmp_path / "a" / "2.png")]
    alone = read_images(str(tmp_path / "b"))[0]["train"]
    assert alone.names == ["image"]
    one = read_images(str(tmp_path / "b" / "3.png"))[0]["train"]
    assert one.column("image") == [str(tmp_path / "b" / "3.png")]
    with pytest.raises(DataError, match="no labels at"):
        label_column(alone, "image", {})


def test_paths_in_a_table_are_relative_to_its_file(tmp_path):
    put(tmp_path / "pictures" / "1.png")
    lines = [
        {"photo": "pictures/1.png", "kind": "a", "said": "1.5"},
        {"photo": "/abroad/2.png", "kind": "b", "said": ""},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = read_images(str(tmp_path / "rows.jsonl"))[0]["train"]
    assert table.column("photo") == [str(tmp_path / "pictures" / "1.png"), "/abroad/2.png"]
    assert table.column("kind") == ["a", "b"]
    (tmp_path / "deep" / "train").mkdir(parents=True)
    put(tmp_path / "deep" / "train" / "7.png")
    (tmp_path / "deep" / "train" / "rows.csv").write_text("file,label\n7.png,x\n")
    table = read_images(str(tmp_path / "deep"))[0]["train"]
    assert table.column("file") == [str(tmp_path / "deep" / "train" / "7.png")]


def test_names_without_an_ending_are_paths_where_there_are_such_files(tmp_path):
    put(tmp_path / "p" / "1.png")
    (tmp_path / "p" / "1.png").rename(tmp_path / "p" / "one")
    (tmp_path / "rows.csv").write_text("file,label\np/one,x\n")
    assert read_images(str(tmp_path / "rows.csv"))[0]["train"].column("file") == [str(tmp_path / "p" / "one")]


def test_parquet_files_hold_bytes(tmp_path):
    put(tmp_path / "1.png")
    image = {"bytes": (tmp_path / "1.png").read_bytes(), "path": None}
    pyarrow.parquet.write_table(pyarrow.table({"image": [image], "label": ["x"]}), tmp_path / "train.parquet")
    table = read_images(str(tmp_path / "train.parquet"))[0]["train"]
    assert table.column("image")[0]["bytes"] == image["bytes"]


def test_a_place_with_nothing_says_so(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read_images(str(tmp_path))
    with pytest.raises(DataError, match="There is no file or folder"):
        read_images(str(tmp_path / "gone"))


def rows(**columns):
    return Table(columns, [f"t.csv:{i}" for i in range(2)])


def test_the_columns_are_found_by_content_and_name():
    table = rows(file=["a.png", "b.png"], note=["x", "y"], label=["1", "2"])
    assert image_column(table, {})[0] == "file"
    assert label_column(table, "file", {})[0] == "label"
    assert label_column(table, "file", {"label": "note"})[0] == "note"
    assert label_column(rows(file=["a.png", "b.png"], note=["x", "y"]), "file", {}) == ("note", "the only other column")


def test_columns_that_are_not_clear_are_asked_for():
    with pytest.raises(DataError, match="left and right all hold images"):
        image_column(rows(left=["a.png", "b.png"], right=["c.png", "d.png"]), {})
    with pytest.raises(DataError, match="no column holds"):
        image_column(rows(text=["a", "b"]), {})
    with pytest.raises(DataError, match="label column is not clear"):
        label_column(rows(file=["a.png", "b.png"], p=["x", "y"], q=["x", "y"]), "file", {})
    with pytest.raises(DataError, match='no column "fiel"'):
        image_column(rows(file=["a.png", "b.png"]), {"image": "fiel"})
