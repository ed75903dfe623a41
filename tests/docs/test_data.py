"""docs/data.md shows what is read: its samples go through their tasks' readers, columns are found as it says."""

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("PIL")

from PIL import Image

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError
from smidgen.data import columns, conversations, image_columns, interactions
from smidgen.data.boxes import Box
from smidgen.data.labels import understand_labels
from smidgen.data.table import Problem, Table
from smidgen.recipes.load import load_recipe
from smidgen.tasks.base import Asked
from smidgen.tasks.language import source_target
from smidgen.tasks.loading import choose_max_length
from smidgen.tasks.models import Located
from smidgen.tasks.own.rows import rows_said
from smidgen.tasks.registry import task_named, tasks
from smidgen.tasks.row_roles import RowRoles
from smidgen.tasks.text import pair_columns, word_columns
from smidgen.tasks.text.spans import understand_tags

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SAMPLES = {m[2]: m[3] for m in re.finditer(r"^```(\w+) (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)}


def text_classification(table: Table) -> Mapping[str, Any]:
    found = columns.guess_columns(table)
    said = {"text": found.text, "text_pair": found.text_pair, "label": found.label}
    return {role: name for role, name in said.items() if name}


def token_classification(table: Table) -> Mapping[str, Any]:
    found, _ = word_columns.guess_word_columns(table, {})
    tags, _ = understand_tags(found.tag_rows(table) or [])
    assert found.check(table, tags) == {}
    assert tags.scheme == "iob2"
    return {"tokens": found.tokens, "tags": found.tags}


def causal_lm(table: Table) -> Mapping[str, Any]:
    shape = conversations.recognise(table, {})
    for i in range(len(table)):
        assert shape.text(table, i) if shape.kind == "text" else shape.turns(table, i)[-1].is_answer
    return shape.columns


def seq2seq(table: Table) -> Mapping[str, Any]:
    found = source_target.source_and_target(table, {})
    assert found.check(table) == {}
    return found.columns


def embeddings(table: Table) -> Mapping[str, Any]:
    found, _ = pair_columns.pair_columns(table, {})
    assert pair_columns.PairColumns(found).check(table, differ=True) == {}
    return found


def image_classification(table: Table) -> Mapping[str, Any]:
    image, _ = image_columns.image_column(table, {})
    assert all(Path(path).is_file() for path in table.column(image))
    return {"image": image, "label": image_columns.label_column(table, image, {})[0]}


def object_detection(table: Table) -> Mapping[str, Any]:
    assert all(isinstance(box, Box) for box in chain.from_iterable(table.column("boxes")))
    return {"image": "image", "boxes": "boxes"}


def recommendation(table: Table) -> Mapping[str, Any]:
    found, _ = interactions.interaction_columns(table, {})
    for i in range(len(table)):
        row = {role: table.column(name)[i] for role, name in found.items()}
        assert interactions.check_interaction(row, as_numbers=True) is None
    return found


FINDERS = {
    "text_classification": text_classification,
    "token_classification": token_classification,
    "causal_lm": causal_lm,
    "seq2seq": seq2seq,
    "embeddings": embeddings,
    "image_classification": image_classification,
    "object_detection": object_detection,
    "recommendation": recommendation,
}
SHAPES = {  # sample -> task, role -> the column that is found
    "films.csv": ("text_classification", {"text": "text", "label": "label"}),
    "topics.jsonl": ("text_classification", {"text": "text", "label": "labels"}),
    "pairs-with-labels.csv": (
        "text_classification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    "news.conll": ("token_classification", {"tokens": "column_1", "tags": "column_3"}),
    "news.jsonl": ("token_classification", {"tokens": "tokens", "tags": "tags"}),
    "stories.jsonl": ("causal_lm", {"text": "text"}),
    "answers.jsonl": ("causal_lm", {"prompt": "prompt", "completion": "completion"}),
    "alpaca.jsonl": ("causal_lm", {"prompt": "instruction", "input": "input", "completion": "output"}),
    "openai.jsonl": ("causal_lm", {"messages": "messages"}),
    "sharegpt.jsonl": ("causal_lm", {"messages": "conversations"}),
    "summaries.csv": ("seq2seq", {"source": "source", "target": "target"}),
    "translations.jsonl": ("seq2seq", {"source": "translation.en", "target": "translation.de"}),
    "questions.csv": ("embeddings", {"text": "query", "text_pair": "answer"}),
    "triples.jsonl": ("embeddings", {"text": "anchor", "text_pair": "positive", "negative": "negative"}),
    "likeness.csv": ("embeddings", {"text": "sentence1", "text_pair": "sentence2", "score": "score"}),
    "photos": ("image_classification", {"image": "image", "label": "folder"}),
    "prices.csv": ("image_classification", {"image": "image", "label": "label"}),
    "toys": ("object_detection", {"image": "image", "boxes": "boxes"}),
    "coco": ("object_detection", {"image": "image", "boxes": "boxes"}),
    "taken.csv": ("recommendation", {"user": "user", "item": "item", "rating": "rating", "time": "time"}),
}
OTHERS = {"items.csv", "rows.py", "letters.csv", "letters.yaml"}  # read in tests of their own


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all samples, and a picture wherever one is named."""
    monkeypatch.chdir(tmp_path)
    pictures = [line for text in SAMPLES.values() for line in re.findall(r"(?:photos|pictures)/\S+\.jpg", text)]
    for name, text in SAMPLES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if "." in name:
            Path(name).write_text(text)
    for path in [*pictures, "toys/images/train/1.jpg", "toys/images/val/2.jpg", "coco/1.jpg"]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(path)
    return tmp_path


def read(task: str, where: str) -> tuple[dict[str, Table], list[Problem]]:
    kind = task_named(task)
    return kind.read(where, kind.Settings())


def test_every_sample_of_the_page_is_tried_and_every_task_has_one() -> None:
    assert {name.split("/")[0] for name in SAMPLES} == SHAPES.keys() | OTHERS
    ours = {name for name, kind in tasks().items() if kind.__module__ == f"smidgen.tasks.{name}"}
    assert ours == {task for task, _ in SHAPES.values()} | {"custom"}
    assert set(re.findall(r"^\| \[.*\| `(\w+)` \|$", PAGE, re.MULTILINE)) == ours


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_is_read_and_its_columns_are_found(name: str) -> None:
    task, expected = SHAPES[name]
    tables, problems = read(task, name)
    assert problems == []
    assert FINDERS[task](tables["train"]) == expected


@pytest.mark.usefixtures("here")
def test_labels_parts_boxes_and_features_are_what_the_page_says() -> None:
    labels = read("text_classification", "topics.jsonl")[0]["train"].column("labels")
    assert understand_labels(labels).kind == "multilabel"
    photos = read("image_classification", "photos")[0]
    assert {part: len(table) for part, table in photos.items()} == {"train": 2, "test": 1}
    toys = read("object_detection", "toys")[0]
    assert [[box.name for box in boxes] for boxes in toys["train"].column("boxes")] == [["ball", "kite"]]
    assert list(toys["valid"].column("boxes")) == [[]]
    coco = read("object_detection", "coco")[0]["train"].column("boxes")[0]
    assert coco[0][1:5] == pytest.approx((20 / 64, 20 / 48, 20 / 64, 16 / 48))
    features = interactions.read_features(read("recommendation", "items.csv")[0]["train"])
    assert features["alien"] == ["genres=horror", "genres=science fiction"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["plain", "named"])
def test_rows_of_a_python_file_are_read_and_named(name: str) -> None:
    table = rows_said(f"rows.py:{name}")
    assert table.where(1) == f"{name}[1]"
    assert table.column("row")[1].read() is not None


@pytest.mark.usefixtures("here")
def test_the_same_columns_come_from_parquet_arrow_and_packed_files() -> None:
    import gzip

    from pyarrow import csv, feather, parquet

    rows = csv.read_csv("films.csv")
    parquet.write_table(rows, "films.parquet")
    feather.write_feather(rows, "films.feather")
    Path("packed.csv.gz").write_bytes(gzip.compress(Path("films.csv").read_bytes()))
    found = {
        name: read("text_classification", name)[0]["train"]
        for name in ("films.csv", "films.parquet", "films.feather", "packed.csv.gz")
    }
    assert all(table.held().columns == found["films.csv"].columns for table in found.values())
    assert found["films.parquet"].where(1) == "films.parquet row 2"


@pytest.mark.usefixtures("here")
def test_roles_that_are_said_in_a_recipe_are_taken() -> None:
    recipe = load_recipe("letters.yaml")
    table = read("text_classification", recipe.data.train)[0]["train"]
    model, device = Located("models/minilm", "models/minilm", True), torch.device("cpu")
    asked = Asked(model=model, plan=Plan(), device=device, seed=0, columns=recipe.data.columns)
    beside = RowRoles.said(table, asked, ("group", "time", "weight"))
    assert beside.check(table) == {}
    assert beside.groups(table) == ["c17", "c17"]
    assert beside.latest(table, 0.5) == ([0], [1])
    weights = beside.learned(table).weights(table)
    assert weights is not None
    assert weights.tolist() == pytest.approx([4 / 3, 2 / 3])


def usual_names() -> dict[tuple[str, str], set[str]]:
    """(task, roles) -> all names in the third column of the page's table."""
    section = PAGE.partition("\n## Which columns\n")[2].partition("\n## ")[0]
    found: dict[tuple[str, str], set[str]] = {}
    task = ""
    for line in [line for line in section.splitlines() if line.startswith("| ")][1:]:
        first, roles, names = (cell.strip() for cell in line.strip("|").split("|"))
        task = first.strip("`") or task
        found[task, roles.replace("`", "")] = set(re.findall(r"`(\w+)`", names))
    return found


def test_the_usual_names_on_the_page_are_the_programs() -> None:
    pairs = {name for pair in columns._PAIRS for name in pair}
    assert usual_names() == {
        ("text_classification", "text"): set(columns._TEXTS),
        ("text_classification", "text, text_pair"): pairs,
        ("text_classification", "label"): set(columns._LABELS),
        ("token_classification", "tokens"): set(word_columns._WORDS),
        ("token_classification", "tags"): {*word_columns._TAGS, *word_columns._OTHER_TAGS},
        ("token_classification", "document"): {"document"},
        ("causal_lm", "messages"): set(),
        ("causal_lm", "prompt, completion"): {name for pair in conversations._PROMPTS for name in pair},
        ("causal_lm", "input"): {*conversations._INPUTS, "instruction"},
        ("causal_lm", "text"): set(conversations._TEXTS),
        ("seq2seq", "source, target"): {name for pair in source_target._PAIRS for name in pair},
        ("embeddings", "text, text_pair"): {name for pair in pair_columns._PAIRS for name in pair},
        ("embeddings", "negative"): set(pair_columns._NEGATIVES),
        ("embeddings", "score"): set(pair_columns._SCORES),
        ("image_classification", "image"): set(),
        ("image_classification", "label"): set(image_columns._LABELS),
        **{("recommendation", role): set(names) for role, names in interactions._USUAL.items()},
    }
    known = tasks()
    for task, roles in usual_names():
        assert set(roles.split(", ")) <= set(known[task].roles)


def test_rows_are_cut_where_the_page_says() -> None:
    section = PAGE.partition("\n## How long a row may be\n")[2].partition("\n## ")[0]
    for device, length in (("cpu", 128), ("cuda", 512)):
        assert choose_max_length([2000] * 20, 4096, torch.device(device))[0] == length
        assert f"beyond {length}" in section
    assert choose_max_length([2000] * 20, 64, torch.device("cpu"))[0] == 64


def first_bad(where: str) -> str:
    """Where the first bad image of a folder is said to be."""
    try:
        return read("object_detection", where)[1][0].where
    except DataError as error:  # no image is left
        return str(error).split("\n  ")[1].partition(": ")[0]


@pytest.mark.usefixtures("here")
def test_bad_rows_are_named_as_the_page_says() -> None:
    section = PAGE.partition("\n## Where a bad row is named\n")[2]
    names = [
        read(task, sample)[0]["train"].where(1)
        for task, sample in (
            ("text_classification", "films.csv"),
            ("token_classification", "news.conll"),
            ("image_classification", "photos"),
        )
    ]
    Path("toys/labels/train/1.txt").write_text("0 0.5 0.5 0.2 0.3\n9 0.5 0.5 0.1 0.1\n")
    names.append(first_bad("toys"))
    coco = Path("coco/instances_train.json")
    good = coco.read_text()
    for whole, broken in (("[10, 12, 20, 16]", "[10, 12, 20]"), ("1.jpg", "2.jpg")):
        coco.write_text(good.replace(whole, broken))
        names.append(first_bad("coco"))
    assert all(f"`{name}`" in section for name in names), names
