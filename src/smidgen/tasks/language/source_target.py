"""Rows of a text and what is to be written to it: which columns hold them, as said, by usual names, or the only two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...core.errors import DataError
from ...data.lazy import mapped
from ...data.table import Table
from ..text.rows import wrong_texts

_SAMPLE = 2000  # rows looked at
_PAIRS = (
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("input", "output"),
    ("prompt", "completion"),
)


@dataclass(frozen=True)
class SourceTarget:
    """The columns.   target: None where rows are only to be predicted."""

    source: str
    target: str | None

    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with rows."""
        return wrong_texts(table, (self.source, self.target))

    def sources(self, table: Table) -> Sequence[str]:
        return table.column(self.source)

    def targets(self, table: Table) -> Sequence[str] | None:
        """None where the table has none."""
        return None if self.target is None or self.target not in table.columns else table.column(self.target)

    def fitting(self, table: Table, *, labelled: bool) -> "SourceTarget":
        """The columns of another file, which may have other names.  Raises DataError."""
        if not labelled:
            return SourceTarget(self.source if self.source in table.columns else source_alone(table), None)
        if self.source in table.columns and self.target in table.columns:
            return self
        return SourceTarget(*source_and_target(table, {})[:2])


def by_language(table: Table) -> Table:
    """The same table with each column of translations as one column per language: "translation.en" ..."""
    columns: dict[str, Sequence[Any]] = {}
    for name, values in table.columns.items():
        some = [value for value in values[:_SAMPLE] if value is not None]
        if some and all(isinstance(value, dict) and len(value) > 1 for value in some):
            columns |= {f"{name}.{key}": mapped(values, partial(_of_language, key)) for key in some[0]}
        else:
            columns[name] = values
    return Table(columns, table.origins)


def _of_language(key: str, value: Any) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def source_and_target(table: Table, said: Mapping[str, str]) -> tuple[str, str, str]:
    """The columns of sources and targets, and why: what was said, usual names, translations, or the only two columns.

    Raises DataError.
    """
    for name in said.values():
        table.column(name)
    usual = [pair for pair in _PAIRS if set(pair) <= set(table.columns)]
    languages = [name for name in table.columns if "." in name]
    pairs = [*usual, *(tuple(names) for names in (languages, table.names) if len(names) == 2)]
    first, second = pairs[0] if pairs else (None, None)
    source, target = said.get("source"), said.get("target")
    source = source or (second if target == first else first)
    target = target or (first if source == second else second)
    if source is None or target is None or source == target:
        raise DataError(
            "which text is written to which is not clear: say it with --column source=NAME --column target=NAME. "
            f"Columns: {', '.join(table.columns)}"
        )
    why = "usual names for a pair" if (source, target) in usual else "the only two texts of a row"
    return source, target, why


def source_alone(table: Table) -> str:
    """The column of sources in a table without targets.  Raises DataError."""
    found = [name for name in dict.fromkeys(name for name, _ in _PAIRS) if name in table.columns] or table.names
    if len(found) != 1:
        raise DataError(f"which column holds the sources is not clear: {', '.join(found)}. Leave one")
    return found[0]
