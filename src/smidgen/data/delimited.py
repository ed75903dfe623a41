"""CSV and TSV (RFC 4180), row by row: a damaged row is reported and the next one is read.

The first line must name the columns.  There is no guessing of names: a first line that holds a number, or a value that
comes again below it, is data, and the error says which line to put in front.
"""

import csv
import io
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from operator import itemgetter
from typing import Any, BinaryIO, cast

from smidgen.core.errors import DataError
from smidgen.data.lazy import Lazy, Records, ShortColumns
from smidgen.data.lines import Lines
from smidgen.data.raw_text import damage, decode
from smidgen.data.table import Problem, Table
from smidgen.data.values import number

_DELIMITERS = (",", ";", "\t")


def read_delimited(data: bytes, name: str, delimiter: str | None) -> tuple[Table, list[Problem]]:
    """The rows of a CSV or TSV file; all values are strings.

    delimiter: None finds comma, semicolon or tab.   Raises DataError if the first line does not name the columns.
    """
    lines = list(io.StringIO(decode(data, name), newline=""))
    delimiter = delimiter or _find_delimiter(lines)
    start, header = _header(lines, name, delimiter)
    rows: list[list[str]] = []
    origins: list[str] = []
    problems: list[Problem] = []
    for first, _, fields in _whole(lines, start, delimiter, header, name, problems):
        rows.append(fields)
        origins.append(f"{name}:{first + 1}")
    columns: dict[str, Sequence[Any]] = {column: [row[i] for row in rows] for i, column in enumerate(header)}
    _refuse_data_as_header(columns, name, delimiter)
    return Table(columns, origins), problems


def index_delimited(file: BinaryIO, name: str, delimiter: str | None) -> tuple[Table, list[Problem]]:
    """As `read_delimited`, of an open file that stays where it is: every row is checked, and read again when asked
    for.  Short values that come again are kept.
    """
    lines = Lines(file, name, "")
    delimiter = delimiter or _find_delimiter(lines)
    start, header = _header(lines, name, delimiter)
    firsts, counts = array("q"), array("l")  # of the rows: the first line, and how many
    short = ShortColumns()
    problems: list[Problem] = []
    for first, after, fields in _whole(lines, start, delimiter, header, name, problems):
        firsts.append(first)
        counts.append(after - first)
        short.add(dict(zip(header, fields, strict=True)))

    def load(rows: Sequence[int]) -> list[list[str]]:
        heights = [counts[row] for row in rows]
        texts = lines.texts([firsts[row] for row in rows], [firsts[row] + counts[row] for row in rows])
        return _parsed(texts, heights, delimiter, len(header))

    records, rows = Records(load), range(len(firsts))
    columns: dict[str, Sequence[Any]] = {
        column: short.columns.get(column) or Lazy(records.field(itemgetter(i)), rows) for i, column in enumerate(header)
    }
    _refuse_data_as_header(columns, name, delimiter)
    return Table(columns, Lazy(lambda some: [f"{name}:{firsts[row] + 1}" for row in some], rows)), problems


def _parsed(texts: list[str], heights: list[int], delimiter: str, width: int) -> list[list[str]]:
    """The fields of records that were read before.   texts: of each.   heights: how many lines each has."""
    whole = "".join(text if text.endswith(("\n", "\r")) else text + "\n" for text in texts)
    reader, found, ends = csv.reader(io.StringIO(whole, newline=""), delimiter=delimiter, strict=True), [], []
    try:
        for fields in reader:
            found.append(fields)
            ends.append(reader.line_num)
        if ends == list(accumulate(heights)) and all(len(fields) == width for fields in found):
            return found
    except csv.Error:
        pass
    # one by one: a quote of a file that knows no quoting has taken several together
    alone = [_records(list(io.StringIO(text, newline="")), 0, delimiter, width) for text in texts]
    return [cast(list[str], next(each)[2]) for each in alone]


def _whole(
    lines: Sequence[str], start: int, delimiter: str, header: list[str], name: str, problems: list[Problem]
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the records that are right, as `_records`; what is wrong with the others goes to `problems`."""
    for first, after, fields in _records(lines, start, delimiter, len(header)):
        if isinstance(fields, list) and _is_blank(fields, header):
            continue
        wrong = fields if isinstance(fields, str) else _wrong(fields, header, delimiter)
        if wrong is None and isinstance(fields, list):
            yield first, after, fields
        else:
            problems.append(Problem(f"{name}:{first + 1}", str(wrong)))


def _records(
    lines: Sequence[str], start: int, delimiter: str, width: int | None = None
) -> Iterator[tuple[int, int, list[str] | str]]:
    """Yield indices of the first line and of the line after, and the fields or what is wrong.  Blank lines give no
    fields.

    A quote that is left open would swallow the rows after it.  So where a record of several lines does not come out
    right, only its first line is bad, and reading goes on at the second.
    """
    first = start  # of the record that is being read
    while first < len(lines):
        begin = first
        reader = csv.reader((lines[i] for i in range(begin, len(lines))), delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                after = begin + reader.line_num
                if after - first > 1 and _swallowed(lines[first:after], fields, delimiter, width):
                    break
                yield first, after, fields
                first = after
            else:
                return
            what = "a quote is opened and not closed"
        except csv.Error as error:
            what = str(error)
        plain = lines[first].rstrip("\r\n").split(delimiter)
        # many tab-separated files know no quoting: a quote is then a character like any other
        is_unquoted = delimiter == "\t" and len(plain) == (width or len(plain))
        yield first, first + 1, plain if is_unquoted else f"{what} (a quote inside a quoted field is written twice)"
        first += 1


def _swallowed(lines: Sequence[str], fields: list[str], delimiter: str, width: int | None) -> bool:
    """Whether an open quote took these lines together by mistake."""
    if width is None:
        return False
    return len(fields) != width or (delimiter == "\t" and all(line.count("\t") == width - 1 for line in lines))


def _is_blank(fields: list[str], header: list[str]) -> bool:
    return not fields or (len(fields) == 1 < len(header) and not fields[0].strip())


def _wrong(fields: list[str], header: list[str], delimiter: str) -> str | None:
    if len(fields) != len(header):
        hint = f'; a text that holds "{delimiter}" needs quotes' if len(fields) > len(header) else ""
        return f"{len(fields)} fields, but the header has {len(header)} ({', '.join(header)}){hint}"
    if fields == header:
        return "the header again"
    return damage("\n".join(fields))


def _find_delimiter(lines: Sequence[str]) -> str:
    """The one that splits the first line, and most evenly the lines after it; a comma if none does."""

    def evenness(delimiter: str) -> float:
        records = islice(_records(lines[:200], 0, delimiter), 50)
        widths = [len(fields) for *_, fields in records if isinstance(fields, list) and fields]
        return sum(width == widths[0] for width in widths) / len(widths) if widths and widths[0] > 1 else 0.0

    return max(_DELIMITERS, key=evenness)


def _header(lines: Sequence[str], name: str, delimiter: str) -> tuple[int, list[str]]:
    """Index of the line after the header, and the column names."""
    records = _records(lines, 0, delimiter)
    for first, _, fields in records:
        if isinstance(fields, str):
            raise DataError(f"{name}:{first + 1}: the header cannot be read: {fields}")
        if any(field.strip() for field in fields):
            break
    else:
        raise DataError(f"{name} is empty: it has neither a header nor rows.")
    if what := damage("\n".join(fields)):
        raise DataError(f"{name}:{first + 1}: the header has {what}")
    # pandas writes its index below an empty name
    header = [field.strip() or f"column_{i}" for i, field in enumerate(fields, start=1)]
    if twice := [column for column, count in Counter(header).items() if count > 1]:
        raise DataError(f"{name}:{first + 1}: columns are named twice: {', '.join(twice)}. Rename one of each.")
    next_record = next(records, None)
    return (len(lines) if next_record is None else next_record[0]), header


def _refuse_data_as_header(columns: Mapping[str, Sequence[Any]], name: str, delimiter: str) -> None:
    """Raise DataError if the "names" are values: a number, or something that comes again below."""
    values = [
        column
        for column, cells in columns.items()
        if number(column) is not None or sum(cell == column for cell in cells[:1000]) > 1
    ]
    if not values:
        return
    lengths = {column: sum(map(len, cells[:1000])) for column, cells in columns.items()}
    longest = max(lengths, key=lambda column: lengths[column])
    others = [column for column in columns if column != longest]
    label = min(others, key=lambda column: len(set(columns[column][:1000])), default=None)
    names = {longest: "text", label: "label"}
    example = delimiter.join(names.get(column, f"column_{i}") for i, column in enumerate(columns, start=1))
    raise DataError(
        f"{name} has no header: its first line holds {', '.join(repr(value[:40]) for value in values)}, which is data. "
        f"Put a line of {len(columns)} column names in front, for instance: {example!r}"
    )
