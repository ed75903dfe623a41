"""Labels: their kind and names are found, and the rows that do not fit are named."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.errors import DataError
from smidgen.data.labels import Kind, Labels, check_text, understand_labels


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        (["pos", "neg", "pos "] * 5, "binary", ("neg", "pos")),
        ([1, 0] * 5, "binary", ("0", "1")),
        (["1", "0"] * 5, "binary", ("0", "1")),
        ([1.0, 0.0] * 5, "binary", ("0", "1")),
        ([True, False] * 5, "binary", ("false", "true")),
        ([10, 9, 1] * 5, "multiclass", ("1", "9", "10")),
        (["10", "9", "1"] * 5, "multiclass", ("1", "9", "10")),
        ([1, 2, 3, 4, 5], "multiclass", ("1", "2", "3", "4", "5")),
        (list(range(77)) * 3, "multiclass", tuple(map(str, range(77)))),
        (["01", "02", "10"] * 5, "multiclass", ("01", "02", "10")),
        (["a", 1, 2.0] * 5, "multiclass", ("1", "2", "a")),
        ([["a", "b"], ["b"], []] * 5, "multilabel", ("a", "b")),
        (["action|drama", "drama", "comedy|action", "comedy"] * 5, "multilabel", ("action", "comedy", "drama")),
        (["a; b", "b", "a"] * 5, "multilabel", ("a", "b")),
        (["['a', 'b']", "['b']", "['a']"] * 5, "multilabel", ("a", "b")),
        ([i / 7 for i in range(40)], "regression", ()),
        ([str(i / 7) for i in range(40)], "regression", ()),
        ([0.0, 0.5, 1.0] * 5, "regression", ()),
        (list(range(18, 90)), "regression", ()),
    ],
)
def test_the_kind_and_names_are_found(values: list[Any], kind: str, names: tuple[str, ...]) -> None:
    labels = understand_labels(values)
    assert (labels.kind, labels.names, dict(labels.problems)) == (kind, names, {})
    assert labels.reason


def test_values_are_encoded_in_any_spelling() -> None:
    classes = Labels(kind="multiclass", names=("1", "2", "10"))
    assert [classes.encode(value) for value in (10, "10", 10.0, " 1 ")] == [2, 2, 2, 0]
    assert Labels(kind="binary", names=("false", "true")).encode(True) == 1
    several = Labels(kind="multilabel", names=("a", "b", "c"))
    assert several.encode(["c", "a"]) == several.encode("a;c") == several.encode("['a', 'c']") == [1.0, 0.0, 1.0]
    assert several.encode([]) == [0.0, 0.0, 0.0]
    assert Labels(kind="regression").encode("-1.5e1") == -15.0


def test_an_unknown_class_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r'"postive" is not a class\. Did you mean "positive"\? Classes: "negative", '):
        Labels(kind="binary", names=("negative", "positive")).encode("postive")
    with pytest.raises(DataError, match="the label is missing"):
        Labels(kind="binary", names=("no", "yes")).encode(None)
    with pytest.raises(DataError, match="'high', not a number"):
        Labels(kind="regression").encode("high")


@pytest.mark.parametrize(
    ("usual", "odd", "what"),
    [
        ([0, 1], None, "missing"),
        ([0, 1], float("nan"), r"missing \(NaN\)"),
        (["a", "b"], " ", "missing"),
        (["a", "b"], "NaN", "missing"),
        ([0.5, 1.5], float("inf"), "infinite"),
        ([0, 1], "yes", r"'yes' \(word\), where a number is usual"),
        ([0, 1], True, "true or false"),
        ([0, 1], 0.5, "0.5; the others are whole numbers"),
        ([0, 1], [1], r"\[1\] \(list\)"),
        ([0.5, 1.5], "high", "'high'"),
        (["a", "b"], 3, r"3 \(number\), where a word is usual"),
        (["a", "b"], {"a": 1}, "not a class"),
        ([["a"], ["b"]], "a", "where a list is usual"),
        ([["a"], ["b"]], ["a", None], "part that is no class"),
        (["positive", "negative"], "postive", 'alone; is it "positive"'),
    ],
)
def test_a_lone_odd_label_is_a_problem_of_its_row(usual: list[Any], odd: Any, what: str) -> None:
    labels = understand_labels(usual * 100 + [odd])
    assert list(labels.problems) == [200]
    assert re.search(what, labels.problems[200])
    assert labels.kind == understand_labels(usual * 100).kind
    assert labels.names == understand_labels(usual * 100).names


def test_rare_classes_among_small_ones_are_kept_with_a_note() -> None:
    labels = understand_labels(["a"] * 30 + ["b"] * 3 + ["c"])
    assert labels.names == ("a", "b", "c")
    assert labels.problems == {}
    assert labels.notes == ('with one row only, so it is trained but never measured: "c"',)


def test_classes_that_differ_in_case_are_noted() -> None:
    assert "upper and lower case" in understand_labels(["Yes", "yes", "no"] * 5).notes[0]


def test_the_kind_that_the_user_gives_stands() -> None:
    assert understand_labels([1, 2, 3] * 5, kind="regression").kind == "regression"
    assert understand_labels(["a", "b"] * 5, kind="multiclass").kind == "multiclass"
    assert understand_labels(["a", "b;a"] * 5, kind="multilabel").names == ("a", "b")
    assert understand_labels([0.5, 1.5] * 5, kind="binary").names == ("0.5", "1.5")
    assert list(understand_labels([1, 2, 3, "x"], kind="regression").problems) == [3]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([None, ""], None, "None of 2 rows has a label"),
        (["a"] * 5, None, 'Every label is "a"'),
        ([2.5] * 5, None, r"Every label is 2\.5"),
        ([[], []], None, "Every list of labels is empty"),
        ([f"text {i}" for i in range(50)], None, "50 rows have 50 different labels.*not classes"),
        (["a", "b", "c"] * 3, "binary", 'has 2 classes; the labels are "a", "b", "c"'),
        (["a", "b"], "regression", "Regression needs numbers, and no label is one"),
        ([[0, 1, 1], [1, 0, 0]], None, "vectors of 0 and 1"),
    ],
)
def test_labels_with_nothing_to_learn_are_refused(values: list[Any], kind: Kind | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        understand_labels(values, kind=kind)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("good – schön 🙂", None),
        (None, "missing"),
        (float("nan"), "missing"),
        (3, "not a string but 3"),
        ("", "empty"),
        (" \n\t", "empty"),
        ("caf\ufffd", "1 replacement characters"),
        ("a\0b", "NUL"),
        ("half \ud83d", "surrogate"),
    ],
)
def test_a_text_that_cannot_be_used_says_why(text: Any, what: str | None) -> None:
    found = check_text(text)
    assert (found is None) if what is None else (what in str(found))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "a", "b;c", "[a]", "1", "1e5", "e5", "nan", "."]),
    st.lists(st.sampled_from(["a", 1, None])),
    st.dictionaries(st.text(), st.none()),
)


@given(values=st.lists(VALUES), kind=st.sampled_from([None, "binary", "multiclass", "multilabel", "regression"]))
def test_every_row_without_a_problem_can_be_encoded(values: list[Any], kind: Kind | None) -> None:
    try:
        labels = understand_labels(values, kind=kind)
    except DataError:
        return
    for i, value in enumerate(values):
        if i not in labels.problems:
            labels.encode(value)
