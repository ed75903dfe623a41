"""Rows that stay in their files: equal to rows in memory, whatever is asked of them, and small."""

import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.errors import DataError
from smidgen.data import read as reading_module
from smidgen.data.arrow import load_from_hub
from smidgen.data.delimited import index_delimited, read_delimited
from smidgen.data.json_lines import index_json_lines, read_json_lines
from smidgen.data.lazy import Lazy, joined, mapped
from smidgen.data.read import read, read_splits, reading
from smidgen.data.table import Table

WORDS = ["good", "bad", "fine", "dull", "lovely", "tedious"]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of all lengths, labels that come again, numbers, and now and then nothing."""
    generator = random.Random(seed)
    return [
        {
            "text": " ".join(generator.choices(WORDS, k=generator.randrange(1, 30))) + f' "{i}",\né',
            "label": generator.choice(["yes", "no"]),
            "score": generator.random(),
            "words": generator.choices(WORDS, k=3),
            "none": None if i % 7 else i,
        }
        for i in range(count)
    ]


def written(folder: Path, kind: str, some: list[dict[str, Any]]) -> Path:
    """The rows as a file of this kind."""
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(some)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(some[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(some)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=500)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, str(path), compression="lz4", chunksize=500)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    return path


def both(path: Path) -> tuple[Table, Table]:
    """The rows where they are, and in memory."""
    with reading(False):
        lazy, problems = read(path)
    with reading(True):
        held, same = read(path)
    assert problems == same
    assert lazy.is_lazy
    assert not held.is_lazy
    return lazy, held


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "feather", "arrow"])
def test_rows_where_they_are_equal_rows_in_memory(tmp_path: Path, kind: str) -> None:
    lazy, held = both(written(tmp_path, kind, rows(6000)))
    assert lazy.names == held.names
    for name in held.names:
        assert list(lazy.column(name)) == held.column(name)
        assert lazy.column(name)[5999] == held.column(name)[-1]
        assert lazy.column(name)[10:20] == held.column(name)[10:20]
    assert list(lazy.origins) == held.origins
    assert lazy.where(4321) == held.where(4321)
    order = random.Random(1).sample(range(6000), 5000)
    many, few = lazy.select(order), lazy.select(order).select(range(0, 5000, 7))
    assert many.is_lazy
    assert not few.is_lazy
    assert few.columns == held.select(order).select(range(0, 5000, 7)).columns
    assert list(many.column("text")) == held.select(order).column("text")
    assert list(many.origins) == held.select(order).origins


def test_files_of_one_split_follow_on_each_other(tmp_path: Path) -> None:
    for number in range(3):
        part = tmp_path / f"part-{number}"
        part.mkdir()
        written(part, ("jsonl", "parquet", "arrow")[number], rows(50, seed=number))
    lazy, held = both(tmp_path)
    assert [list(lazy.column(name)) for name in held.names] == [held.column(name) for name in held.names]
    order = random.Random(0).sample(range(150), 150)
    assert lazy.column("text").take(order) == [held.column("text")[i] for i in order]
    assert lazy.where(149) == "part-2/rows.arrow row 50"


def test_compressed_files_are_unpacked_beside_and_a_json_array_is_read_whole(tmp_path: Path) -> None:
    import gzip

    some = rows(20)
    lines = "".join(json.dumps(row) + "\n" for row in some).encode()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    lazy, held = both(tmp_path / "rows.jsonl.gz")
    assert list(lazy.column("text")) == held.column("text")
    (tmp_path / "rows.json").write_text(json.dumps(some))
    with reading(False):
        assert not read(tmp_path / "rows.json")[0].is_lazy


def test_a_saved_data_set_and_one_of_the_hub_stay_where_they_are(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    said = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    said.select([2, 0, 1]).save_to_disk(str(tmp_path / "saved"))
    lazy, held = both(tmp_path / "saved")
    assert list(lazy.column("label")) == held.column("label") == [None, "yes", "no"]
    repository = tmp_path / "repository"
    repository.mkdir()
    written(repository, "jsonl", rows(30)).rename(repository / "train.jsonl")
    found = load_from_hub(str(repository))  # the hub's own way of reading, of a folder that is here
    assert list(found) == ["train"]
    with reading(False):
        parts, _ = read_splits(tmp_path / "saved")
    assert parts["train"].is_lazy


@given(st.binary(max_size=300))
def test_any_bytes_are_read_as_they_are_in_memory(data: bytes) -> None:
    ways: list[tuple[Callable[[bytes], Any], Callable[[BinaryIO], Any]]] = [
        (lambda held: read_json_lines(held, "f"), lambda file: index_json_lines(file, "f")),
        (lambda held: read_delimited(held, "f", ","), lambda file: index_delimited(file, "f", ",")),
        (lambda held: read_delimited(held, "f", "\t"), lambda file: index_delimited(file, "f", "\t")),
    ]
    for whole, by_lines in ways:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            assert outcome(lambda whole=whole: whole(data)) == outcome(
                lambda by_lines=by_lines, file=file: by_lines(file)
            )


def outcome(how: Callable[[], Any]) -> str:
    """What came of reading, as text: NaN is not equal to itself."""
    try:
        table, problems = how()
        return str(({name: list(values) for name, values in table.columns.items()}, list(table.origins), problems))
    except DataError as error:
        return str(error)


def test_a_file_that_changes_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl", rows(2000))
    with reading(False):
        table, _ = read(path)
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl has changed since it was checked"):
        table.column("text")[0]


def test_a_parquet_file_that_is_damaged_inside_names_itself_and_the_column(tmp_path: Path) -> None:
    path = written(tmp_path, "parquet", rows(3000))
    data = bytearray(path.read_bytes())
    data[50:4000] = bytes(3950)
    path.write_bytes(data)
    with reading(False):
        table, _ = read(path)
    with pytest.raises(DataError, match=r'column "text" of rows\.parquet cannot be read; is it damaged'):
        list(table.column("text"))
    with reading(True), pytest.raises(DataError, match=r"rows\.parquet"):
        read(path)


def test_rows_stay_in_their_file_where_they_would_take_more_than_a_quarter_of_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "jsonl", rows(100))
    size = path.stat().st_size
    for free, is_lazy in ((4 * 7 * size, False), (4 * 7 * size - 4, True)):
        monkeypatch.setattr(reading_module, "free_memory", lambda device, free=free: free)
        assert read(path)[0].is_lazy is is_lazy


def test_long_values_are_read_few_at_a_time() -> None:
    asked: list[int] = []

    def read_them(some: Any) -> list[str]:
        asked.append(len(some))
        return ["x" * (1 << 20) for _ in some]

    for _ in Lazy(read_them, range(300)):
        pass
    assert asked[0] == 16
    assert max(asked[1:]) == 4


def test_images_with_their_path_are_as_long_as_their_bytes() -> None:
    asked: list[int] = []

    def read_them(some: Any) -> list[Any]:
        asked.append(len(some))
        return [{"bytes": bytes(1 << 20), "path": f"{i}.png"} for i in some]

    assert len(list(Lazy(read_them, range(40)))) == 40
    assert max(asked[1:]) <= 4


def test_functions_of_columns_and_columns_behind_each_other_stay_lazy() -> None:
    lazy = Lazy(lambda some: [str(i) for i in some], range(10))
    assert list(mapped(lazy, len)) == [1] * 10
    assert isinstance(mapped(lazy, len), Lazy)
    assert mapped(["a", "bb"], len) == [1, 2]
    assert joined([lazy, ["x"]])[-1] == "x"
    assert joined([["a"], ["b"]]) == ["a", "b"]
    assert lazy == [str(i) for i in range(10)]
    assert lazy != ["0"]


MEASURED = """
import sys
from pathlib import Path
import psutil, torch
from smidgen.data.columns import guess_columns
from smidgen.data.labels import check_text, understand_labels
from smidgen.data.read import read, reading
from smidgen.data.split import duplicate_groups, split

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
with reading(sys.argv[2] == "True"):
    table, _ = read(sys.argv[1])
columns = guess_columns(table)
labels = understand_labels(table.column(columns.label))
assert not any(map(check_text, table.column(columns.text)))
groups = duplicate_groups(table.column(columns.text))
sides = split(len(table), labels=table.column(columns.label), groups=groups, seed=0)
sides = [table.select(side) for side in sides]
print(resident("VmHWM") - before, len(table), labels.kind)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_a_large_file_is_read_checked_and_split_in_a_fraction_of_the_memory_that_its_rows_take(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    generator = random.Random(0)
    words = [f"word{i}" for i in range(3000)]
    with path.open("w") as file:
        for _ in range(1000):
            text = " ".join(generator.choices(words, k=24))
            for i in range(100):  # all different, and quickly made
                label = ("good", "bad")[i % 2]
                file.write(json.dumps({"text": f"{text} {generator.random()}", "label": label}) + "\n")
    assert path.stat().st_size > 20e6
    peaks = {}
    for in_memory in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(path), str(in_memory)], capture_output=True, text=True, check=True
        )
        megabytes, count, kind = done.stdout.split()
        assert (count, kind) == ("100000", "binary")
        peaks[in_memory] = float(megabytes)
    assert peaks[False] < 75  # measured 35: a few numbers a row
    assert peaks[False] < peaks[True] / 2  # measured 145
