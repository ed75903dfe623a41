"""Values as files hold them: CSV has strings only, so a string that reads as a number or a date is one."""

import math
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from typing import Any

_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")  # "007" is a name
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def number(value: Any) -> float | None:
    """The finite number that a value is or spells; None for all else, and for True and False."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond the floats
        return None
    return found if math.isfinite(found) else None


def instant(value: Any) -> float | None:
    """A time as a number, larger the later it is: itself, or the seconds of a date since 1970; None for all else.

    Dates are `datetime` and `date` objects, and strings in ISO 8601; in UTC where they name no zone.
    """
    if (found := number(value)) is not None:
        return found
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        return None
    seconds = ((value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH).total_seconds()
    return seconds if math.isfinite(seconds) else None  # pandas has a datetime that is none, NaT


def are_numbers(times: Iterable[Any]) -> bool:
    """Whether most of the times of a column are numbers, rather than dates."""
    lead = 0
    for time in times:
        if number(time) is not None:
            lead += 1
        elif instant(time) is not None:
            lead -= 1
    return lead > 0


def wrong_time(time: Any, *, as_numbers: bool) -> str | None:
    """What is wrong with a time of a column whose times are numbers, or dates."""
    if as_numbers:
        return None if number(time) is not None else f"{time!r:.40} is no number as the other times; write one"
    if number(time) is None and instant(time) is not None:
        return None
    return f"{time!r:.40} is no date in ISO 8601; write 2024-02-01 or 2024-02-01T09:30:00Z"


def class_name(value: Any) -> str:
    """The name of the class: "1" for 1, 1.0 and "1"; "true" for True; strings without the space around them."""
    if isinstance(value, bool):
        return str(value).lower()
    found = number(value)
    if found is not None and found.is_integer() and abs(found) < 2**53:
        return str(int(found))
    return str(value).strip()
