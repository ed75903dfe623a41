"""Values as files hold them: CSV has strings only, so a string that reads as a number is one."""

import math
import re
from typing import Any

_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")  # "007" is a name


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


def class_name(value: Any) -> str:
    """The name of the class: "1" for 1, 1.0 and "1"; "true" for True; strings without the space around them."""
    if isinstance(value, bool):
        return str(value).lower()
    found = number(value)
    if found is not None and found.is_integer() and abs(found) < 2**53:
        return str(int(found))
    return str(value).strip()
