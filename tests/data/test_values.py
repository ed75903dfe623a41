"""Values as files hold them: times are numbers or dates, in one order."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from smidgen.data.values import are_numbers, instant, wrong_time


def test_dates_of_any_precision_are_in_order():
    ordered = [
        "2022-12-31",
        "2024-02-01",
        "2024-02-01T00:00:00.25",
        "2024-02-01 09:30",
        "2024-02-01T09:30:01Z",
        "20240201T093002",
        "2024-W05-5",  # a Friday
        date(2024, 2, 3),
        datetime(2024, 2, 3, 0, 0, 1),
    ]
    instants = [instant(value) for value in ordered]
    assert None not in instants
    assert instants == sorted(set(instants))
    assert instant("1970-01-02") == instant(date(1970, 1, 2)) == 24 * 3600


def test_zones_are_heeded_and_none_is_utc():
    noon = datetime(2024, 2, 1, 12, tzinfo=UTC).timestamp()
    later = timezone(timedelta(hours=2))
    same = ["2024-02-01T12:00Z", "2024-02-01T14:00+02:00", " 2024-02-01 12:00 ", datetime(2024, 2, 1, 12)]
    assert {instant(value) for value in [*same, datetime(2024, 2, 1, 14, tzinfo=later)]} == {noon}
    assert instant("2024-02-01T23:00-05:00") > instant("2024-02-02T03:00Z")
    assert instant("0001-01-01T00:00+14:00") < instant("0001-01-01T00:00")  # before the first that datetime has in UTC


def test_numbers_are_themselves_however_they_are_written():
    assert [instant(value) for value in (7, 7.5, "9", " 10 ", "1e3")] == [7, 7.5, 9, 10, 1000]


@pytest.mark.parametrize("value", ["12/31/2022", "1 May 2024", "2024-02-30", "2024-13-01", "noon", "", None, True, []])
def test_what_is_neither_is_no_time(value):
    assert instant(value) is None
    assert wrong_time(value, as_numbers=False) == (
        f"{value!r} is no date in ISO 8601; write 2024-02-01 or 2024-02-01T09:30:00Z"
    )
    assert wrong_time(value, as_numbers=True) == f"{value!r} is no number as the other times; write one"


def test_a_datetime_of_pandas_that_is_none_is_no_time():
    pandas = pytest.importorskip("pandas")
    assert instant(pandas.NaT) is None
    assert instant(pandas.Timestamp("1970-01-01T00:00:01")) == 1


def test_a_column_is_of_the_kind_that_most_are_and_the_others_are_wrong():
    assert are_numbers([1, "2", "2024-02-01", "soon"])
    assert not are_numbers([1, "2024-02-01", date(2024, 2, 2)])
    assert not are_numbers(["12/31/2022"])  # so that the remedy is a date
    assert wrong_time("2024-02-01", as_numbers=True) == "'2024-02-01' is no number as the other times; write one"
    assert wrong_time(20240201, as_numbers=False).startswith("20240201 is no date in ISO 8601")
    assert wrong_time("5", as_numbers=True) is wrong_time("2024-02-01", as_numbers=False) is None
