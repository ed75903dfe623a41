"""Columns: the user's word first, then usual names, then the content, and an error where that is not clear."""

from typing import Any

import pytest

from smidgen.core.errors import DataError
from smidgen.data.columns import guess_columns
from smidgen.data.table import Table

LONG = [f"this is the text of row number {i}, some words long" for i in range(40)]
OTHER = [f"and here the second text of row number {i}, as long" for i in range(40)]
SHORT = [f"key-{i}" for i in range(40)]
CLASS = ["yes", "no"] * 20


def table(**columns: list[Any]) -> Table:
    return Table(columns, [f"a.csv:{i}" for i in range(2, 42)])


@pytest.mark.parametrize(
    ("columns", "text", "pair", "label"),
    [
        ({"text": LONG, "label": CLASS}, "text", None, "label"),
        ({"Review": LONG, "Sentiment": CLASS}, "Review", None, "Sentiment"),
        ({"idx": SHORT, "sentence": LONG, "label": CLASS}, "sentence", None, "label"),
        ({"title": SHORT, "content": LONG, "label": CLASS, "rating": CLASS}, "content", None, "label"),
        ({"premise": LONG, "hypothesis": OTHER, "label": CLASS}, "premise", "hypothesis", "label"),
        ({"question": LONG, "sentence": OTHER, "label": CLASS}, "question", "sentence", "label"),
        ({"text": LONG, "score": [i / 7 for i in range(40)]}, "text", None, "score"),
        ({"id": list(range(40)), "words": LONG, "is_spam": CLASS}, "words", None, "is_spam"),
        ({"id": SHORT, "words": LONG, "valence": [str(i / 7) for i in range(40)]}, "words", None, "valence"),
        ({"words": LONG, "genres": [["a", "b"], []] * 20}, "words", None, "genres"),
        (
            {"url": [f"example.org/{'x' * 90}/{i}" for i in range(40)], "words": LONG, "kind": CLASS},
            "words",
            None,
            "kind",
        ),
        ({"text": LONG, "label": CLASS, "comment": [None] * 40}, "text", None, "label"),
    ],
)
def test_usual_tables_are_understood(columns: dict[str, list[Any]], text: str, pair: str | None, label: str) -> None:
    chosen = guess_columns(table(**columns))
    assert (chosen.text, chosen.text_pair, chosen.label) == (text, pair, label)
    assert set(chosen.reasons) == {"text", "label"} | ({"text_pair"} if pair else set())
    assert text in chosen.reasons["text"]


def test_an_answer_of_yes_and_no_is_no_text() -> None:
    chosen = guess_columns(table(question=LONG, answer=CLASS))
    assert (chosen.text, chosen.text_pair, chosen.label) == ("question", None, "answer")


def test_what_the_user_says_stands() -> None:
    chosen = guess_columns(table(text=LONG, label=CLASS, other=OTHER, mood=CLASS), text="other", label="mood")
    assert (chosen.text, chosen.label) == ("other", "mood")
    assert chosen.reasons == {"text": "--text-column says so", "label": "--label-column says so"}
    assert guess_columns(table(text=LONG, label=CLASS, other=OTHER), text_pair="other").text == "text"


def test_unlabelled_rows_take_no_label_from_the_content() -> None:
    assert guess_columns(table(text=LONG, language=CLASS), allow_unlabelled=True).label is None
    assert guess_columns(table(text=LONG, label=CLASS), allow_unlabelled=True).label == "label"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"a": LONG, "b": OTHER, "label": CLASS},
            r"text column is not clear: it could be [ab] or [ab]\..*--text-column",
        ),
        ({"review": LONG, "comment": OTHER, "label": CLASS}, "could be review or comment"),
        ({"text": LONG, "a": CLASS, "b": CLASS}, "a and b could all be it.*--label-column"),
        ({"text": LONG, "rating": CLASS, "sentiment": CLASS}, "could be rating or sentiment"),
        ({"text": LONG, "key": SHORT}, "label column is not clear: .*none looks like it"),
        ({"x": [1.5] * 40, "label": CLASS}, "no other column holds text"),
    ],
)
def test_what_is_not_clear_is_refused_with_an_example_of_each_column(
    columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        guess_columns(table(**columns))
    for name, values in columns.items():
        assert f"\n  {name}: {str(values[0])[:40]}" in str(refused.value)


def test_wrong_names_are_all_reported_with_the_nearest() -> None:
    with pytest.raises(DataError) as refused:
        guess_columns(table(text=LONG, label=CLASS), text="txt", label="lable")
    assert '--text-column "txt" is not a column. Did you mean "text"?' in str(refused.value)
    assert '--label-column "lable" is not a column. Did you mean "label"?' in str(refused.value)
    with pytest.raises(DataError, match='"text" is given for two roles'):
        guess_columns(table(text=LONG, label=CLASS), text="text", label="text")
