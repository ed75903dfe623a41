"""What the labels are (two classes, several, several at once, numbers), and which rows have a label that cannot be one.

Numbers may come as strings, as they do from CSV: "1", 1 and 1.0 are one class.  The rules, in order:

- lists, or strings that join parts by ";" or "|" where the parts come again    -> multilabel
- words                                                                         -> classes
- whole numbers: at most 20 different ones that come again, or ids from 0 or 1
  without a gap                                                                 -> classes
- other numbers                                                                 -> regression
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from smidgen.core.errors import DataError, nearest
from smidgen.data.values import class_name, number

Kind = Literal["binary", "multiclass", "multilabel", "regression"]

_MISSING = {"", "nan", "null", "<na>", "#n/a"}  # "none" may well be a class
_MOST = 0.9  # share of the rows that makes a type the rule and the others outliers
_ALONE = 10  # a class of one row is taken for a slip if every larger class has at least so many


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the labels of a task are.

    names: of the classes; numbers by size, words by alphabet; empty for regression.   reason: why this kind, in words.
    problems: row -> what is wrong with its label.   notes: what is odd and yet usable.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    reason: str = ""
    problems: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def encode(self, value: Any) -> int | float | list[float]:
        """The target: class index, number, or one 0.0 / 1.0 per class.  Raises DataError if it is none of ours."""
        if what := _unusable(value):
            raise DataError(what)
        if self.kind == "regression":
            return _as_number(value)
        if self.kind == "multilabel":
            present = {self._index(part) for part in _parts(value)}
            return [float(i in present) for i in range(len(self.names))]
        return self._index(class_name(value))

    def _index(self, name: str) -> int:
        if name not in self.names:
            near = nearest(name, self.names)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise DataError(f'"{name}" is not a class.{hint} Classes: {_listed(self.names)}.')
        return self.names.index(name)


def understand_labels(values: Sequence[Any], *, kind: Kind | None = None) -> Labels:
    """Find the kind and names of the labels, and the rows whose label is missing or unlike the others.

    kind: what the user said it is.
    Raises DataError if the labels cannot be what was said, or there is nothing to learn.
    """
    problems = {i: what for i, value in enumerate(values) if (what := _unusable(value))}
    if len(problems) == len(values):
        raise DataError(f"None of {len(values)} rows has a label. Is it another column? Set --label-column.")
    rows = _Rows((i, value) for i, value in enumerate(values) if i not in problems)
    form = _usual_form(rows, kind, problems)
    rows = rows.without(problems)
    if kind == "multilabel" or (kind is None and (form == "list" or _are_joined(rows.values))):
        return _multilabel(rows, problems)
    if kind == "regression" or (kind is None and form == "number" and not _are_classes(rows, problems)):
        return _regression(rows, problems)
    return _classes(rows.without(problems), problems, kind)


class _Rows:
    """Values and the rows they stand in; equal values are one object, so that labels of many rows take little."""

    def __init__(self, rows: Iterable[tuple[int, Any]]) -> None:
        self.numbers, self.values = array("q"), list[Any]()
        same: dict[Any, Any] = {}
        for i, value in rows:
            self.numbers.append(i)
            known = isinstance(value, str | int | float)
            self.values.append(same.setdefault((type(value), value), value) if known else value)

    def __len__(self) -> int:
        return len(self.values)

    def items(self) -> Iterator[tuple[int, Any]]:
        return zip(self.numbers, self.values, strict=True)

    def without(self, problems: Mapping[int, str]) -> "_Rows":
        return _Rows((i, value) for i, value in self.items() if i not in problems)


def check_text(value: Any) -> str | None:
    """What is wrong with a text, or None: missing, not a string, empty, or damaged by a wrong decoding."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        return f"the text is not a string but {value!r:.40}"
    if not value.strip():
        return "the text is empty"
    if "\ufffd" in value:
        return f"the text has {value.count(chr(0xFFFD))} replacement characters (U+FFFD): it was decoded wrongly"
    if "\0" in value:
        return "the text has a NUL character"
    if not value.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        return "the text has half of a surrogate pair: it was cut inside a character"
    return None


def _form(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if number(value) is not None:
        return "number"
    if isinstance(value, str):
        return "word"
    return "list" if isinstance(value, list | tuple) else type(value).__name__


def _as_number(value: Any) -> float:
    found = number(value)
    if found is None:
        raise DataError(f"the label is {value!r:.40}, not a number")
    return found


def _unusable(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in _MISSING):
        return "the label is missing"
    if isinstance(value, float) and not math.isfinite(value):
        return "the label is missing (NaN)" if math.isnan(value) else "the label is infinite"
    if isinstance(value, list | tuple) and any(_unusable(part) or _form(part) == "list" for part in value):
        return f"the label has a part that is no class: {value!r:.40}"
    if isinstance(value, dict | bytes):
        return f"the label is {value!r:.40}, not a class or number"
    return None


def _usual_form(rows: _Rows, kind: Kind | None, problems: dict[int, str]) -> str:
    """What the labels are: lists, numbers, words or truth values; rows of another form become problems.

    Where no form has a majority of nine in ten, all are names of classes.
    """
    if kind == "multilabel":
        return "list"
    counts = Counter(map(_form, rows.values))
    form, count = counts.most_common(1)[0]
    allowed = {form}
    if kind == "regression":
        form, allowed = "number", {"number"}
    elif form != "list" and count < _MOST * len(rows):
        form, allowed = "word", {"word", "number", "true or false"}
    for i, value in rows.items():
        # a number in a string may be the name of a class among words
        if _form(value) not in allowed and not (form == "word" and isinstance(value, str)):
            problems[i] = f"the label is {value!r:.40} ({_form(value)}), where a {form} is usual"
    return form


def _are_joined(values: Sequence[Any]) -> bool:
    """Whether strings hold several classes each: some are split, and the parts are fewer than the whole strings."""
    strings = [value for value in values if isinstance(value, str)]
    several = [value for value in strings if len(_parts(value)) > 1]
    if len(several) < max(2, 0.05 * len(strings)):
        return False
    return len({part for value in strings for part in _parts(value)}) <= len(set(strings))


def _parts(value: Any) -> list[str]:
    """The classes of one row: of a list, of "a;b" or "a|b", or of a list that was written as a string."""
    if isinstance(value, list | tuple):
        return [class_name(part) for part in value]
    text = class_name(value)
    if text.startswith("[") and text.endswith("]"):
        parts = [part.strip().strip("'\"") for part in text[1:-1].split(",")]
    else:
        parts = re.split(r"[;|]", text)
    return [class_name(part) for part in parts if part.strip()]


def _are_classes(rows: _Rows, problems: dict[int, str]) -> bool:
    """Whether numbers are classes.  A few with a fraction among whole ones (1 in 100) become problems."""
    numbers = list(map(_as_number, rows.values))
    whole = [number for number in numbers if number.is_integer()]
    distinct = sorted(set(whole))
    if not whole or len(numbers) - len(whole) > len(numbers) / 100:
        return False
    is_numbered = distinct[0] in (0, 1) and distinct[-1] - distinct[0] == len(distinct) - 1
    few = len(distinct) <= 20 and (len(distinct) <= 2 or is_numbered or len(whole) >= 2 * len(distinct))
    if not few and not (is_numbered and len(whole) >= 3 * len(distinct)):
        return False
    for (i, value), found in zip(rows.items(), numbers, strict=True):
        if not found.is_integer():
            problems[i] = f"the label is {value}; the others are whole numbers that stand for classes"
    return True


def _regression(rows: _Rows, problems: Mapping[int, str]) -> Labels:
    numbers = list(map(_as_number, rows.values))
    if len(set(numbers)) < 2:
        raise DataError(
            f"Every label is {numbers[0]:g}: there is nothing to learn." if numbers else _no_numbers(problems)
        )
    reason = f"numbers from {min(numbers):g} to {max(numbers):g}, {len(set(numbers))} different ones"
    return Labels(kind="regression", reason=reason, problems=problems)


def _no_numbers(problems: Mapping[int, str]) -> str:
    return f"Regression needs numbers, and no label is one: {next(iter(problems.values()))}."


def _multilabel(rows: _Rows, problems: Mapping[int, str]) -> Labels:
    parts = list(map(_parts, rows.values))
    lengths = {len(row) for row in parts}
    if (
        len(lengths) == 1
        and {"0", "1"} >= {p for row in parts for p in row}
        and any(len(set(r)) < len(r) for r in parts)
    ):
        raise DataError("The labels are vectors of 0 and 1. Give the names of the classes that apply, as a list.")
    counts = Counter(part for row in parts for part in set(row))
    if not counts:
        raise DataError("Every list of labels is empty: there is nothing to learn.")
    reason = f"several classes a row: {_listed(_sorted(counts))}"
    return Labels(kind="multilabel", names=_sorted(counts), reason=reason, problems=problems, notes=_notes(counts))


def _classes(rows: _Rows, problems: dict[int, str], kind: Kind | None) -> Labels:
    names = _Rows((i, class_name(value)) for i, value in rows.items())
    counts = Counter(names.values)
    larger = [count for count in counts.values() if count > 1]
    if len(larger) > 1 and min(larger) >= _ALONE:
        slips = {name for name, count in counts.items() if count == 1}
        for i, name in names.items():
            if name in slips:
                near = nearest(name, [other for other in counts if counts[other] > 1], count=1)
                hint = f'; is it "{near[0]}"?' if near else ""
                problems[i] = f'"{name}" is the label of this row alone{hint}'
        counts = Counter({name: count for name, count in counts.items() if count > 1})
    total = sum(counts.values())
    if len(counts) < 2:
        raise DataError(f'Every label is "{next(iter(counts))}": there is nothing to tell apart.')
    if len(counts) > total / 2 and total >= 20:
        raise DataError(
            f"{total} rows have {len(counts)} different labels, such as {_listed(list(counts), 3)}: "
            "these are not classes. Is the label another column? Set --label-column."
        )
    if kind == "binary" and len(counts) != 2:
        raise DataError(f"A binary task has 2 classes; the labels are {_listed(_sorted(counts))}.")
    found: Kind = kind or ("binary" if len(counts) == 2 else "multiclass")
    each = ", ".join(f'"{name}" ({counts[name]})' for name in _sorted(counts)[:10])
    reason = f"{len(counts)} classes: {each}{', ...' if len(counts) > 10 else ''}"
    return Labels(kind=found, names=_sorted(counts), reason=reason, problems=problems, notes=_notes(counts))


def _notes(counts: Mapping[str, int]) -> tuple[str, ...]:
    notes = []
    if alone := [name for name, count in counts.items() if count == 1]:
        notes.append(f"with one row only, so it is trained but never measured: {_listed(alone)}")
    folded = Counter(name.casefold() for name in counts)
    if alike := [name for name in counts if folded[name.casefold()] > 1]:
        notes.append(f"classes that differ in upper and lower case only: {_listed(sorted(alike))}")
    return tuple(notes)


def _sorted(names: Mapping[str, int]) -> tuple[str, ...]:
    sort_key: Callable[[str], Any] = float if all(_form(name) == "number" for name in names) else str
    return tuple(sorted(names, key=sort_key))


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(f'"{name}"' for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
