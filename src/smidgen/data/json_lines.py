"""JSON lines, and a JSON array of objects: rows with named values, one by one, so that a damaged row is only itself."""

import json
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from smidgen.core.errors import DataError
from smidgen.data.lazy import Lazy, Records, ShortColumns
from smidgen.data.lines import Lines
from smidgen.data.raw_text import damage, decode
from smidgen.data.table import Problem, Table

_SEPARATOR = re.compile(r"[\s,]*")


class _Twice(ValueError):
    """An object has a key twice."""


class _Bad(str):
    """What is wrong with a row, in the place of the row."""


def read_json_lines(data: bytes, name: str) -> tuple[Table, list[Problem]]:
    """One object a line; blank lines are passed over."""
    lines = enumerate(decode(data, name).split("\n"), start=1)
    return _table([(f"{name}:{number}", _parse(line)) for number, line in lines if line.strip()])


def index_json_lines(file: BinaryIO, name: str) -> tuple[Table, list[Problem]]:
    """As `read_json_lines`, of an open file that stays where it is: every line is checked, and read again when asked
    for.  Short values that come again are kept.
    """
    lines = Lines(file, name, "\n")
    numbers, shapes = array("q"), array("q")  # of the objects: which line, which keys
    known: dict[tuple[str, ...], int] = {}
    short = ShortColumns()
    bad: dict[int, str] = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        row = _parse(line)
        if isinstance(row, dict):
            numbers.append(number)
            shapes.append(known.setdefault(tuple(row), len(known)))
            short.add(row)
        else:
            bad[number] = str(_wrong(row, []))
    times, counts = Counter(shapes), Counter[str]()
    for shape, i in known.items():
        counts.update(dict.fromkeys(shape, times[i]))
    usual = _usual(counts, len(numbers))
    wrong = {i: what for shape, i in known.items() if (what := _wrong(dict.fromkeys(shape), usual))}
    if wrong:
        good = [i for i, shape in enumerate(shapes) if shape not in wrong]
        bad |= {numbers[i]: wrong[shape] for i, shape in enumerate(shapes) if shape in wrong}
        numbers = array("q", (numbers[i] for i in good))
        short.columns = {key: [values[i] for i in good] for key, values in short.columns.items()}
    names = dict.fromkeys(key for shape, i in known.items() if i not in wrong for key in shape)
    records = Records(lambda some: [json.loads(line) for line in lines.texts(some, [i + 1 for i in some])])
    columns: dict[str, Sequence[Any]]
    columns = {key: short.columns.get(key) or Lazy(records.field(partial(_value, key)), numbers) for key in names}
    problems = [Problem(f"{name}:{number + 1}", what) for number, what in sorted(bad.items())]
    return Table(columns, Lazy(lambda some: [f"{name}:{number + 1}" for number in some], numbers)), problems


def read_json_array(data: bytes, name: str) -> tuple[Table, list[Problem]]:
    """One array of objects.  Raises DataError where it breaks off: what follows cannot be told apart into rows."""
    text = decode(data, name)
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    rows: list[tuple[str, Any]] = []
    start = text.index("[") + 1
    number = 1 + text.count("\n", 0, start)
    last = 0  # line of the item before
    while True:
        separator = _SEPARATOR.match(text, start)
        begin = separator.end() if separator else start
        number += text.count("\n", start, begin)
        if text.startswith("]", begin):
            return _table(rows)
        try:
            row, start = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number}: the array breaks off here ({error}), after {len(rows)} rows. "
                "Mend it, or write JSON lines: there a damaged row is only itself."
            ) from None
        what = damage(text[begin:start])
        where = f"{name}:{number}" + (f" item {len(rows) + 1}" if number == last else "")
        rows.append((where, _Bad(what) if what else row))
        last, number = number, number + text.count("\n", begin, start)


def _parse(line: str) -> Any:
    if what := damage(line):
        return _Bad(what)
    try:
        return json.loads(line, object_pairs_hook=_of_pairs)
    except _Twice as error:
        return _Bad(str(error))
    except json.JSONDecodeError as error:
        return _Bad(f"not JSON: {error.msg}, at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        return _Bad(f"not JSON that can be read: {error}")


def _of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise _Twice(f"the key {', '.join(map(repr, twice))} comes twice")
    return row


def _without_doubles(pairs: list[tuple[str, Any]]) -> Any:
    """In an array what is wrong stands in the place of the object, for the array goes on behind it."""
    try:
        return _of_pairs(pairs)
    except _Twice as error:
        return _Bad(str(error))


def _value(key: str, row: dict[str, Any]) -> Any:
    return row.get(key)


def _table(rows: list[tuple[str, Any]]) -> tuple[Table, list[Problem]]:
    """Places and rows -> columns.  A key that a row lacks is None there.

    Usual keys are those of three quarters of the objects.  One that lacks half of them or more is bad: it is another
    kind of record, or has its keys misspelt.  One that lacks fewer is kept, since a missing key matters only where it
    is used, and a missing text or label is found where texts and labels are checked.
    """
    objects = [row for _, row in rows if isinstance(row, dict)]
    usual = _usual(Counter(key for row in objects for key in row), len(objects))
    good: list[dict[str, Any]] = []
    origins: list[str] = []
    problems: list[Problem] = []
    for where, row in rows:
        if what := _wrong(row, usual):
            problems.append(Problem(where, what))
        else:
            good.append(row)
            origins.append(where)
    names = dict.fromkeys(key for row in good for key in row)
    return Table({key: [row.get(key) for row in good] for key in names}, origins), problems


def _usual(counts: Mapping[str, int], rows: int) -> list[str]:
    return [key for key, count in counts.items() if count >= 0.75 * rows]


def _wrong(row: Any, usual: list[str]) -> str | None:
    if isinstance(row, _Bad):
        return row
    if not isinstance(row, dict):
        return f"not an object with named values, but {str(row)[:40]}"
    lacking = [key for key in usual if key not in row]
    if lacking and 2 * len(lacking) >= len(usual):
        has = ", ".join(map(repr, row)) or "nothing"
        return f"it lacks {', '.join(map(repr, lacking))}, which other rows have; it has {has}"
    return None
