"""Interactions: columns found, ids as names, features, splits by time, histories."""

import pytest

from smidgen.core.errors import DataError
from smidgen.data.interactions import (
    Histories,
    at_random,
    check_interaction,
    identity,
    interaction_columns,
    latest,
    leave_one_out,
    read_features,
)
from smidgen.data.table import Table


def table(**columns) -> Table:
    return Table(columns, [f"t.csv:{i + 2}" for i in range(len(next(iter(columns.values()))))])


def test_usual_names_are_found_and_what_is_said_stands():
    columns, reasons = interaction_columns(
        table(user_id=[1], movieId=[2], timestamp=[3], votes=[4]), {"rating": "votes"}
    )
    assert columns == {"user": "user_id", "item": "movieId", "time": "timestamp", "rating": "votes"}
    assert reasons["rating"] == "you said so"


def test_unclear_columns_are_named_together():
    with pytest.raises(DataError, match=r"user could be user or uid.*item has no usual name.*--column item=NAME"):
        interaction_columns(table(user=[1], uid=[2], film=[3]), {})
    with pytest.raises(DataError, match=r'item "flim" is not a column\. Did you mean "film"'):
        interaction_columns(table(user=[1], film=[3]), {"item": "flim"})


def test_an_id_is_a_name_however_it_is_written():
    assert identity(7) == identity("7") == identity(7.0) == "7"
    assert identity(None) == identity(" ") == ""


def test_bad_values_are_said():
    assert check_interaction({"user": 1, "item": 2, "time": "5"}, as_numbers=True) is None
    assert check_interaction({"user": 1, "time": "2024-02-01T09:30"}, as_numbers=False) is None
    assert check_interaction({"user": 1, "item": ""}, as_numbers=True) == "no item"
    wrong = "time 'noon' is no number as the other times; write one"
    assert check_interaction({"user": 1, "time": "noon"}, as_numbers=True) == wrong
    wrong = "time 5 is no date in ISO 8601; write 2024-02-01 or 2024-02-01T09:30:00Z"
    assert check_interaction({"user": 1, "time": 5}, as_numbers=False) == wrong


def test_features_are_words_of_columns_and_titles_are_left_out():
    films = table(
        id=["1", "2", "3", "4"],
        title=["A", "B", "C", "D"],
        genre=["war|drama", "war", "", "drama"],
        decade=[1990, 1990, 1980, 1990],
    )
    assert read_features(films)["1"] == ["genre=war", "genre=drama", "decade=1990"]
    assert read_features(films)["3"] == ["decade=1980"]


def test_leave_one_out_takes_each_users_latest_and_leaves_single_ones():
    kept, held = leave_one_out(["a", "b", "a", "a", "c"], [5.0, 1.0, 9.0, 7.0, 2.0])
    assert (kept, held) == ([0, 1, 3, 4], [2])
    assert leave_one_out(["a", "a"], [1.0, 1.0]) == ([0], [1])  # of equal times the later row
    with pytest.raises(DataError, match="cannot be split"):
        leave_one_out(["a", "b"], [1.0, 2.0])


def test_the_latest_and_random_rows_are_a_share_of_all():
    assert latest([3.0, 1.0, 2.0, 9.0, 4.0], 0.4) == ([0, 1, 2], [3, 4])
    kept, held = at_random(10, 0.3, seed=1)
    assert len(held) == 3
    assert sorted(kept + held) == list(range(10))
    assert at_random(10, 0.3, seed=1) == (kept, held)


def test_histories_are_in_order_of_time_and_end_before_it():
    histories = Histories([0, 0, 1, 0], [10, 11, 12, 13], [3.0, 1.0, 2.0, 2.0])
    assert histories.items(0) == [11, 13, 10]
    assert histories.count_before(0, 2.0) == 1
    assert histories.count_before(0, 9.0) == 3
    assert histories.items(5) == []
