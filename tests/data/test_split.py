"""Splitting: shares, classes and groups hold for any data, and the seed decides everything."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.errors import ConfigError, DataError
from smidgen.data.split import duplicate_groups, split, subset


@given(labels=st.lists(st.sampled_from("aabbbbbcd"), min_size=8, max_size=80), seed=st.integers(0, 9))
def test_every_row_is_on_one_side_and_every_class_of_two_on_both(labels: list[str], seed: int) -> None:
    if max(Counter(labels).values()) < 2:
        return
    train, valid = split(len(labels), labels=labels, seed=seed)
    assert sorted(train + valid) == list(range(len(labels)))
    for name, count in Counter(labels).items():
        assert name in {labels[i] for i in train}
        assert count < 2 or name in {labels[i] for i in valid}


@given(groups=st.lists(st.integers(0, 12), min_size=10, max_size=80), seed=st.integers(0, 9))
def test_no_group_is_on_both_sides(groups: list[int], seed: int) -> None:
    if len(set(groups)) < 2:
        return
    train, valid = split(len(groups), groups=groups, fraction=0.3, seed=seed)
    assert not {groups[i] for i in train} & {groups[i] for i in valid}
    assert train
    assert valid


def test_the_shares_hold_in_every_class_and_in_all() -> None:
    labels = ["a"] * 1000 + ["b"] * 100 + ["c"] * 10
    _, valid = split(1110, labels=labels, fraction=0.2, seed=0)
    assert Counter(labels[i] for i in valid) == {"a": 200, "b": 20, "c": 2}
    many = [i % 30 for i in range(90)]  # three rows a class: a third or nothing each, unless rounding is carried on
    assert len(split(90, labels=many, fraction=0.4, seed=0)[1]) == 36


def test_numbers_are_split_by_quantile() -> None:
    labels = [float(i) for i in range(1000)]
    _, valid = split(1000, labels=labels, fraction=0.1, seed=0)
    assert len(valid) == 100
    assert Counter(int(labels[i] // 100) for i in valid) == dict.fromkeys(range(10), 10)


def test_the_seed_decides_the_split() -> None:
    assert split(100, seed=3) == split(100, seed=3)
    assert split(100, seed=3) != split(100, seed=4)


def test_duplicates_do_not_leak_into_validation() -> None:
    texts = [f"Text  {i % 40}" if i % 2 else f"text {i % 40} " for i in range(400)]
    groups = duplicate_groups([*texts, "TEXT 1"])
    assert groups[1] == groups[41] == groups[400]
    assert len(set(groups)) == 40
    train, valid = split(400, groups=groups[:400], seed=0)
    assert not {texts[i].split()[1] for i in train} & {texts[i].split()[1] for i in valid}
    assert len(valid) == 80


def test_a_group_with_contradicting_labels_counts_for_the_rarer_class() -> None:
    labels = ["a", "b", "a", "b"] + ["a"] * 16
    groups = [0, 0, 1, 1, *range(2, 18)]
    train, valid = split(20, labels=labels, groups=groups, seed=0)
    assert "b" in {labels[i] for i in train}
    assert "b" in {labels[i] for i in valid}


def test_lists_of_classes_are_split_by_combination() -> None:
    labels = [[1.0, 0.0]] * 50 + [[1.0, 1.0]] * 10
    _, valid = split(60, labels=labels, seed=0)
    assert sum(labels[i] == [1.0, 1.0] for i in valid) == 2


@pytest.mark.parametrize(("n", "groups"), [(1, None), (3, [0, 0, 0])])
def test_what_cannot_be_split_is_refused(n: int, groups: list[int] | None) -> None:
    with pytest.raises(DataError, match=rf"{n} rows \(1 different\) cannot be split"):
        split(n, groups=groups, seed=0)
    with pytest.raises(ConfigError, match=r"fraction is 1\.5"):
        split(10, fraction=1.5, seed=0)


def test_a_subset_keeps_the_proportions_and_every_class() -> None:
    labels = ["a"] * 600 + ["b"] * 395 + ["c"] * 5
    chosen = subset(1000, labels, 100, seed=0)
    assert len(chosen) == len(set(chosen)) == 100
    counts = Counter(labels[i] for i in chosen)
    assert counts["c"] == 1
    assert abs(counts["a"] - 60) <= 1
    assert chosen == subset(1000, labels, 100, seed=0)
    assert chosen != subset(1000, labels, 100, seed=1)
    assert subset(10, None, 20, seed=0) == list(range(10))
    assert len(subset(1000, list(range(1000)), 7, seed=0)) == 7
