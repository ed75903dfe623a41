"""Bytes to text without losing the place of a damaged row."""

import codecs
import re

from smidgen.core.errors import DataError

# surrogateescape turns each byte that is not UTF-8 into one of these, so that only its row is bad and not the file
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def decode(data: bytes, name: str) -> str:
    """The text of a file; bytes that are not UTF-8 are kept, for `damage` to find.

    Raises DataError if the file is not text at all, or UTF-16.
    """
    return data[begin(data[:8192], name) :].decode("utf-8", errors="surrogateescape")


def begin(start: bytes, name: str) -> int:
    """Where the text begins in a file with this start: behind a mark of UTF-8.  Raises DataError as `decode`."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is UTF-16, and UTF-8 is needed: iconv -f UTF-16 -t UTF-8 {name} > utf8-{name}")
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{name} is a zip archive or an Excel workbook. Save the sheet as CSV (UTF-8).")
    if start.count(0) > len(start) // 10:
        raise DataError(f"{name} is not a text file. Readable are CSV, TSV, JSON lines, JSON, Parquet and Arrow.")
    return len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0


def damage(record: str) -> str | None:
    """What is wrong with the bytes of this record: not UTF-8, or a NUL; None if nothing is."""
    if found := _ESCAPED_BYTE.search(record):
        byte = ord(found.group()) - 0xDC00
        before = _ESCAPED_BYTE.sub("?", record[max(0, found.start() - 20) : found.start()])
        return f"byte 0x{byte:02X} after {before!r} is not UTF-8 (if all rows do this: iconv -f LATIN1 -t UTF-8)"
    if "\0" in record:
        return f"a NUL byte after {record[max(0, record.index(chr(0)) - 20) : record.index(chr(0))]!r}"
    return None
