"""Rows that are words with their tags: which column holds which, and what is wrong with a row."""

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from ...core.errors import DataError, nearest
from ...data.labels import check_text
from ...data.lazy import mapped
from ...data.table import Table
from .spans import Tags

_WORDS = ("tokens", "words", "token", "word", "form")
_TAGS = ("tags", "ner_tags", "labels", "ner", "tag", "label")
_OTHER_TAGS = ("upos", "pos_tags", "pos", "chunk_tags")  # where there is none of the above
_NUMBERED = re.compile(r"column_(\d+)")  # as the reader of CoNLL columns calls them
_SHOWN = 3  # faults of a row in its message


@dataclass(frozen=True, kw_only=True)
class WordColumns:
    """The chosen columns: lists of words and of tags, and which document a row is of.

    tag_names: what the tags mean where they are numbers.
    """

    tokens: str
    tags: str | None = None
    document: str | None = None
    tag_names: tuple[str, ...] = ()

    def words(self, table: Table) -> Sequence[list[str]]:
        """The words of each row, once they are checked."""
        return table.column(self.tokens)

    def tag_rows(self, table: Table) -> Sequence[list[str]] | None:
        """The tags of each row by name; no tags where a row has no list of them.  None where there is no column."""
        if self.tags is None or self.tags not in table.columns:
            return None
        return mapped(table.columns[self.tags], lambda value: self._named(value) or [])

    def _named(self, value: Any) -> list[str] | None:
        """Tags as names.  None for what is no list of strings, or of numbers that have a name."""
        if not isinstance(value, list):
            return None
        if all(isinstance(tag, str) for tag in value):
            return value
        if all(isinstance(tag, int) and 0 <= tag < len(self.tag_names) for tag in value):
            return [self.tag_names[tag] for tag in value]
        return None

    def sentences(self, table: Table) -> Sequence[str]:
        """The words of each row as a text."""
        return mapped(self.words(table), " ".join)

    def documents(self, table: Table) -> Sequence[Hashable] | None:
        """Which document each row is of; None where nothing says."""
        return None if self.document is None else table.column(self.document)

    def rarest(self, table: Table) -> list[str] | None:
        """The rarest tag of each row."""
        rows = self.tag_rows(table)
        counts = Counter(tag for row in rows or [] for tag in row)
        return None if rows is None else [min(row, key=lambda tag: (counts[tag], tag), default="") for row in rows]

    def fitting(self, table: Table, *, labelled: bool) -> "WordColumns":
        """The columns of another file, which may have other names; without tags where nothing is judged."""
        columns, wanted = self, (self.tokens, self.tags if labelled else None)
        if any(name is not None and name not in table.columns for name in wanted):
            columns, _ = guess_word_columns(table, {}, tag_names=self.tag_names, allow_untagged=not labelled)
        return columns if labelled else replace(columns, tags=None)

    @classmethod
    def from_description(cls, said: Mapping[str, Any]) -> Self:
        """From its fields as JSON has them.  Raises KeyError or TypeError."""
        return cls(**{**said, "tag_names": tuple(map(str, said["tag_names"]))})

    def check(self, table: Table, tags: Tags) -> dict[int, str]:
        """What is wrong with rows: no words, no tags or too many, tags that are unknown or break the scheme."""
        found = {i: what for i in range(len(table)) if (what := self._wrong_words(table, i))}
        if self.tags is not None:
            known, rest = set(tags.names), [i for i in range(len(table)) if i not in found]
            found |= {i: what for i in rest if (what := self._wrong_tags(table, i, tags, known))}
        return found

    def _wrong_words(self, table: Table, i: int) -> str | None:
        words = table.column(self.tokens)[i]
        if not isinstance(words, list) or not words:
            return f'column "{self.tokens}": not a list of words but {words!r:.40}'
        return self._listed(table, i, [(j, what) for j, word in enumerate(words) if (what := check_text(word))])

    def _wrong_tags(self, table: Table, i: int, tags: Tags, known: set[str]) -> str | None:
        assert self.tags is not None
        said, words = self._named(table.column(self.tags)[i]), table.column(self.tokens)[i]
        if said is None:
            return f'column "{self.tags}": not a list of tags but {table.column(self.tags)[i]!r:.40}'
        if len(said) != len(words):
            return f"{len(words)} words, but {len(said)} tags"
        unknown = [(j, _unknown(tag, known)) for j, tag in enumerate(said) if tag not in known]
        return self._listed(table, i, unknown or tags.faults(said))

    def _listed(self, table: Table, i: int, faults: Sequence[tuple[int, str]]) -> str | None:
        """Faults of row i with their words, and with their lines where the file has some."""
        if not faults:
            return None
        words, lines = table.column(self.tokens)[i], table.columns.get("lines")
        places = [f"line {lines[i][j]}" if lines else f"word {j + 1}" for j, _ in faults]
        shown = [f"{place} ({str(words[j])!r:.30}): {what}" for place, (j, what) in zip(places, faults, strict=True)]
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        return "; ".join(shown[:_SHOWN]) + more


def guess_word_columns(
    table: Table, said: Mapping[str, str], *, tag_names: Sequence[str] = (), allow_untagged: bool = False
) -> tuple[WordColumns, dict[str, str]]:
    """Choose the columns by role ("tokens", "tags", "document"), and for each in words why.   said: role -> column.

    Raises DataError if a column that was said is not there, or the choice is not clear.
    """
    numbered = sorted((name for name in table.names if _NUMBERED.fullmatch(name)), key=lambda name: int(name[7:]))
    chosen: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for role, column in said.items():
        table.column(column)
        chosen[role], reasons[role] = column, "said"
    if "tokens" not in chosen:
        chosen["tokens"], reasons["tokens"] = _guess(table, "tokens", (_WORDS,), numbered[:1], "first")
    if "tags" not in chosen and not (allow_untagged and not _by_name(table, _TAGS + _OTHER_TAGS) and not numbered[1:]):
        chosen["tags"], reasons["tags"] = _guess(table, "tags", (_TAGS, _OTHER_TAGS), numbered[1:][-1:], "last")
    if "document" not in chosen and "document" in table.columns:
        chosen["document"], reasons["document"] = "document", "sentences of one document are not split"
    columns = WordColumns(**chosen, tag_names=tuple(tag_names))
    if columns.tags is not None and not tag_names:
        _refuse_numbers(table.column(columns.tags), columns.tags)
    return columns, reasons


def _unknown(tag: str, known: set[str]) -> str:
    near = nearest(tag, sorted(known), 1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    return f'"{tag}" is not a tag of the training rows{hint}'


def _by_name(table: Table, usual: Sequence[str]) -> list[str]:
    return [name for name in table.names if name.lower() in usual]


def _guess(table: Table, role: str, usual: Sequence[Sequence[str]], numbered: list[str], which: str) -> tuple[str, str]:
    if numbered:
        return numbered[0], f"the {which} column"
    found = next((names for group in usual if (names := _by_name(table, group))), [])
    if len(found) == 1:
        return found[0], f'"{found[0]}" is a usual name for {role}'
    what = f"could be {' or '.join(found)}" if found else f"has no usual name ({', '.join(usual[0])})"
    raise DataError(
        f"The column of {role} is not clear: it {what}. Say which with data.columns.{role} (--column {role}=NAME). "
        f"Columns: {', '.join(table.names)}."
    )


def _refuse_numbers(rows: Sequence[Any], column: str) -> None:
    numbers = [tag for row in rows if isinstance(row, list) for tag in row if isinstance(tag, int)]
    if numbers:
        raise DataError(
            f'the tags in "{column}" are numbers (to {max(numbers)}), and nothing says what they stand for: '
            "give their names in order, task.tag_names: [O, B-PER, I-PER ...]"
        )
