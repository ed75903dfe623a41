"""Reading: every format gives the same table, and a damaged row is named and is only itself."""

import gzip
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.errors import DataError, MissingDependency
from smidgen.data.labels import check_text, understand_labels
from smidgen.data.read import read, read_splits, reading, split_name
from smidgen.data.table import Table


@pytest.fixture(params=[True, False], ids=["in memory", "where it is"], autouse=True)
def _held(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything on this page holds both ways of reading."""
    with reading(request.param):
        yield


ROWS = [
    {"text": "good, very", "label": "1"},
    {"text": 'a "bad" one', "label": "0"},
    {"text": "fine\nagain", "label": "1"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_text(delimiter: str = ",") -> str:
    def quoted(value: str) -> str:
        doubled = value.replace('"', '""')
        return f'"{doubled}"'

    lines = [("text", "label"), *((quoted(row["text"]), row["label"]) for row in ROWS)]
    return "".join(delimiter.join(line) + "\n" for line in lines)


def json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(table: Table) -> list[dict[str, object]]:
    return [{name: table.column(name)[i] for name in table.names} for i in range(len(table))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", csv_text()),
        ("semicolons.csv", csv_text(";")),
        ("tabs.csv", csv_text("\t")),
        ("tabs.txt", csv_text("\t")),
        ("a.tsv", csv_text("\t")),
        ("windows.csv", csv_text().replace("1\n", "1\r\n").replace("0\n", "0\r\n").replace("label\n", "label\r\n")),
        ("bom.csv", b"\xef\xbb\xbf" + csv_text().encode()),
        ("a.csv.gz", gzip.compress(csv_text().encode(), mtime=0)),
        ("a.jsonl.xz", lzma.compress(json_lines(ROWS).encode())),
        ("a.jsonl", json_lines(ROWS)),
        ("a.ndjson", json_lines(ROWS)),
        ("blank_lines.jsonl", json_lines(ROWS).replace("\n", "\n\n")),
        ("lines.json", json_lines(ROWS)),
        ("array.json", json.dumps(ROWS, indent=2)),
        ("one_line.json", json.dumps(ROWS)),
        ("csv_by_content", csv_text()),
        ("lines_by_content.data", json_lines(ROWS)),
        ("array_by_content", json.dumps(ROWS)),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    table, problems = read(write(tmp_path / name, content))
    assert rows_of(table) == ROWS
    assert problems == []


def test_a_row_knows_its_line_also_after_quoted_line_breaks(tmp_path: Path) -> None:
    table, _ = read(write(tmp_path / "reviews.csv", 'text,label\n"one\ntwo\nthree",1\n\nfour,0\nfive,1\n'))
    assert [table.where(i) for i in range(3)] == ["reviews.csv:2", "reviews.csv:6", "reviews.csv:7"]
    chosen = table.select([2, 0])
    assert [chosen.where(i) for i in range(2)] == ["reviews.csv:7", "reviews.csv:2"]
    assert chosen.column("text") == ["five", "one\ntwo\nthree"]


def test_items_of_a_json_array_know_their_line(tmp_path: Path) -> None:
    table, problems = read(
        write(tmp_path / "a.json", '[\n{"text": "a"},\n\n{"text":\n "b"}, {"text": "c"},\n 7,\n{"text": "d"}]')
    )
    assert table.origins == ["a.json:2", "a.json:4", "a.json:5", "a.json:7"]
    assert [str(problem) for problem in problems] == ["a.json:6: not an object with named values, but 7"]


def test_a_json_array_on_one_line_counts_its_items(tmp_path: Path) -> None:
    table, problems = read(write(tmp_path / "a.json", '[{"text": "a"}, 5, {"text": "c"}]'))
    assert table.origins == ["a.json:1", "a.json:1 item 3"]
    assert problems[0].where == "a.json:1 item 2"


def test_a_json_array_that_breaks_off_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:3: the array breaks off here .* after 1 rows"):
        read(write(tmp_path / "a.json", '[\n{"text": "a"},\n{"text": "b'))


@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        (b"only one", "1 fields, but the header has 2"),
        (b"a, b,1", '3 fields, but the header has 2 (text, label); a text that holds "," needs quotes'),
        (b"caf\xe9,1", "byte 0xE9 after 'caf' is not UTF-8"),
        (b"nul\0,1", "a NUL byte after 'nul'"),
        (b'"never closed,1', "a quote"),
        (b'"closed" too early,1', "expected after"),
        (b"text,label", "the header again"),
    ],
)
def test_a_bad_csv_row_is_named_with_file_and_line_and_the_next_is_read(
    tmp_path: Path, damaged: bytes, what: str
) -> None:
    content = b"text,label\ngood,1\n" + damaged + b'\n"quoted, good",0\nlast,1\n'
    table, problems = read(write(tmp_path / "reviews.csv", content))
    assert table.column("text") == ["good", "quoted, good", "last"]
    assert [problem.where for problem in problems] == ["reviews.csv:3"]
    assert what in problems[0].what


def test_quotes_in_tab_separated_text_are_characters_when_they_do_not_close(tmp_path: Path) -> None:
    content = 'id\ttext\n1\t"Well" he said\n2\t"open\n3\tplain\n4\tclosed"\n5\t"quoted\ttab"\n'
    table, problems = read(write(tmp_path / "tweets.tsv", content))
    assert table.column("text") == ['"Well" he said', '"open', "plain", 'closed"', "quoted\ttab"]
    assert problems == []


def test_each_of_twelve_kinds_of_damage_in_json_lines_is_named_and_the_good_rows_are_counted(tmp_path: Path) -> None:
    damage = [
        b'{"text": "cut off',
        b"not json at all",
        b'["a", "list"]',
        b'"a string"',
        b'{"text": "caf\xe9", "label": 1}',
        b'{"text": "nul \0", "label": 1}',
        b'{"text": "twice", "text": "twice", "label": 1}',
        b'{"label": 1}',
        b'{"text": "no label"}',
        b'{"text": null, "label": 1}',
        b'{"text": "   ", "label": 1}',
        b'{"text": 17, "label": 1}',
        b'{"text": "null label", "label": null}',
        b'{"text": "NaN label", "label": NaN}',
        b'{"text": "another type", "label": "positive"}',
        b'{"text": "a list", "label": [1]}',
        b'{"text": "an object", "label": {"a": 1}}',
        b'{"text": "alone", "label": 99}',
        b'{"text": "a fraction", "label": 0.5}',
        b'{"text": "half \\ud800", "label": 1}',
        b'{"text": "replaced \xef\xbf\xbd", "label": 1}',
        b'{"text": "huge", "label": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"Text": "misspelt", "Label": 1}',
    ]
    lines = [json.dumps({"text": f"row {i}", "label": i % 2}).encode() for i in range(2400)]
    bad_lines = []
    for i, damaged in enumerate(damage):
        lines.insert(100 * i + 50, damaged)
        bad_lines.append(f"train.jsonl:{100 * i + 51}")
    table, problems = read(write(tmp_path / "train.jsonl", b"\n".join(lines)))
    where = [problem.where for problem in problems]
    bad_texts = {i for i, text in enumerate(table.column("text")) if check_text(text)}
    labels = understand_labels(table.column("label"))
    where += [table.where(i) for i in bad_texts | set(labels.problems)]
    assert sorted(where) == sorted(bad_lines)
    assert len(table) - len(bad_texts | set(labels.problems)) == 2400
    assert labels.kind == "binary"


def test_a_key_that_few_rows_lack_is_none_there(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "a", "label": "1", "author": "x"} for i in range(4)]
    del rows[2]["author"]
    table, problems = read(write(tmp_path / "a.jsonl", json_lines(rows)))
    assert table.column("author") == ["x", "x", None, "x"]
    assert problems == []


@pytest.mark.parametrize("content", ["5,nice\n3,dull\n", "nice,positive\ndull,negative\nfine,positive\nfun,positive\n"])
def test_a_file_without_header_is_refused_with_a_line_to_put_in_front(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"has no header: its first line holds .* for instance: '.*text.*'"):
        read(write(tmp_path / "a.csv", content))


def test_an_unnamed_index_column_gets_a_name(tmp_path: Path) -> None:
    table, _ = read(write(tmp_path / "a.csv", ",text,label\n0,a,x\n1,b,y\n"))
    assert table.names == ["column_1", "text", "label"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n \n", "is empty"),
        ("a.csv", b"text,label\n", "has no row that can be read"),
        ("a.csv", b"text,text\na,b\n", "columns are named twice: text"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", b"PK\x03\x04 and so on", "Excel"),
        ("a.bin", bytes(range(4)) * 100 + bytes(400), "is not a text file"),
        ("a.jsonl", b"{\n{\n", r"no row that can be read \(2 bad rows\)\.\n  a\.jsonl:1: not JSON"),
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n", mtime=0)[:-9], "compressed and damaged"),
        ("a.parquet", b"PAR1 cut short", "cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 cut short", "cannot be read as Parquet or Arrow"),
    ],
)
def test_a_file_that_is_not_data_is_an_error_that_says_why(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_name_that_is_not_there_shows_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", csv_text())
    with pytest.raises(DataError, match=r'no file or folder ".*reveiws\.csv"\. Near it: .*reviews\.csv'):
        read(tmp_path / "reveiws.csv")
    with pytest.raises(DataError, match="nor the folder"):
        read(tmp_path / "nowhere" / "reviews.csv")


def test_a_folder_gives_its_splits_by_file_name_or_folder_name(tmp_path: Path) -> None:
    write(tmp_path / "flat/train.csv", "text,label\na,x\n")
    write(tmp_path / "flat/dev.jsonl", '{"text": "b", "label": "x"}\n7\n')
    write(tmp_path / "flat/README.json", "{}")
    write(tmp_path / "deep/train/1.csv", "text,label\na,x\n")
    write(tmp_path / "deep/train/2.csv", "label,text\ny,b\n")
    write(tmp_path / "deep/data/test-00000-of-00001.csv", "text,label\nc,x\n")
    write(tmp_path / "plain/one.csv", "text,label\na,x\n")
    flat, problems = read_splits(tmp_path / "flat")
    assert {name: table.origins for name, table in flat.items()} == {"train": ["train.csv:2"], "valid": ["dev.jsonl:1"]}
    assert [problem.where for problem in problems] == ["dev.jsonl:2"]
    deep, _ = read_splits(tmp_path / "deep")
    assert deep["train"].column("text") == ["a", "b"]
    assert deep["train"].origins == ["train/1.csv:2", "train/2.csv:2"]
    assert deep["test"].origins == ["data/test-00000-of-00001.csv:2"]
    plain, _ = read_splits(tmp_path / "plain")
    assert list(plain) == ["train"]
    assert read(tmp_path / "flat", split="validation")[0].column("text") == ["b"]
    with pytest.raises(DataError, match=r"has several splits: train, valid\. Say which"):
        read(tmp_path / "flat")
    with pytest.raises(DataError, match=r'no split "test"\. It has: train, valid'):
        read(tmp_path / "flat", split="test")


def test_files_of_one_split_must_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "train/1.csv", "text,label\na,x\n")
    write(tmp_path / "train/2.csv", "body,label\na,x\n")
    with pytest.raises(DataError, match=r"text, label at train/1\.csv:2, but body, label at train/2\.csv:2"):
        read(tmp_path)


def test_a_folder_without_data_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "hello")
    with pytest.raises(DataError, match=r"no data files .* it holds notes\.md"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("my_dev.csv", "valid"),
        ("validation_matched", "valid"),
        ("eval", "test"),
        ("Test-1", "test"),
        ("unsupervised", None),
        ("contest", None),
        ("devices", None),
    ],
)
def test_split_names_are_whole_words(name: str, split: str | None) -> None:
    assert split_name(name) == split


def test_parquet_and_arrow_rows_are_counted_from_one(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = pyarrow.table({"text": ["a", None], "label": [1, 0], "__index_level_0__": [7, 8]})
    parquet.write_table(data, tmp_path / "a.parquet")
    parquet.write_table(data, tmp_path / "no_extension")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), data.schema) as file:
        file.write_table(data)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), data.schema) as stream:
        stream.write_table(data)
    for name in ("a.parquet", "no_extension", "a.arrow", "stream.arrow"):
        table, problems = read(tmp_path / name)
        assert rows_of(table) == [{"text": "a", "label": 1}, {"text": None, "label": 0}]
        assert table.where(1) == f"{name} row 2"
        assert problems == []


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r'pip install "smidgen\[text\]"'):
        read(write(tmp_path / "a.parquet", b"PAR1"))


def test_named_classes_of_a_saved_data_set_come_as_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, validation=data.select([1])).save_to_disk(tmp_path / "several")
    data.to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "one")[0].column("label") == ["yes", "no", None]
    assert read(tmp_path / "a.parquet")[0].column("label") == ["yes", "no", None]
    several, _ = read_splits(tmp_path / "several")
    assert several["valid"].column("label") == ["no"]
    assert several["valid"].where(0) == "several/validation row 1"


def test_lists_of_named_classes_come_as_lists_of_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features(tokens=datasets.List(datasets.Value("string")), ner_tags=tags)
    data = datasets.Dataset.from_dict({"tokens": [["Ann", "sat"], []], "ner_tags": [[1, 0], []]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "one")
    for name in ("a.parquet", "one"):
        assert read(tmp_path / name)[0].column("ner_tags") == [["B-PER", "O"], []]


def test_a_damaged_saved_data_set_is_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path / "state.json", "{}")
    with pytest.raises(DataError, match="is a saved data set that cannot be read"):
        read(tmp_path)


def test_a_hub_name_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    class Builder:
        name = "parquet"

    def load(repository: str, configuration: str | None) -> object:
        asked.append((repository, configuration))
        part = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
        return datasets.DatasetDict(train=part, validation_matched=part, validation_mismatched=part, unsupervised=part)

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda repository, configuration: Builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    tables, _ = read_splits("nobody-here/reviews:short")
    assert asked == [("nobody-here/reviews", "short")]
    assert {name: len(table) for name, table in tables.items()} == {"train": 1, "valid": 2}
    assert tables["train"].where(0) == "nobody-here/reviews:short/train row 1"
    Builder.name = "webdataset"
    with pytest.raises(DataError, match="read by the webdataset builder"):
        read_splits("nobody-here/reviews")


def test_an_unreachable_hub_is_one_clear_error() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"is not a file or folder here.* cannot be loaded: .*reach.*Check the name"):
        read("nobody-here/no-such-data")


def test_a_slip_in_a_local_path_does_not_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/reviews.csv", csv_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'no file or folder "data/review"\. Near it: data/reviews\.csv'):
        read("data/review")


def test_a_column_that_is_not_there_shows_the_nearest() -> None:
    table = Table({"text": ["a"], "label": ["1"]}, ["a.csv:2"])
    with pytest.raises(DataError, match=r'no column "lable"\. Did you mean "label"\? Columns: text, label'):
        table.column("lable")
    with pytest.raises(DataError, match="columns of other lengths"):
        Table({"text": ["a", "b"]}, ["a.csv:2"])


@given(
    content=st.lists(
        st.sampled_from([b"text,label", b'"', b"\n", b"\t", b",", b'{"text": 1}', b"[", b"]", b"\xff", b"\0", b"a"])
    ),
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a", "a.csv.gz"]),
)
def test_any_bytes_give_rows_or_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], name: str
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "any" / name, b"".join(content))
    try:
        table, problems = read(file)
    except DataError:
        return
    assert len(table) > 0
    assert len(set(table.origins + [problem.where for problem in problems])) == len(table) + len(problems)
