"""Rows of a text and what is to be written to it: which columns hold them, as said, by usual names, or the only two.

    a pair       source -> target; Alpaca's input stands below its instruction
    a chat       the turns before the last answer -> that answer; of several turns each is a line, "user: Hi"

What a language model learns from (data/conversations.py) is recognised here as there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from ...core.errors import DataError
from ...data.conversations import SAID, Shape, Turn, in_lines, recognise
from ...data.lazy import Lazy, mapped
from ...data.table import Table
from ..text.rows import said_rows, wrong_texts

ROLES = ("source", "input", "target", "messages")  # of columns; input: more of the source, or empty

_SAMPLE = 2000  # rows looked at
_PAIRS = (
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
)
_ALONE = ("input", "prompt", "instruction", "question", "query")  # sources without a target beside them
_AS_SHAPE = {"source": "prompt", "input": "input", "target": "completion", "messages": "messages"}  # role -> there
_FLAGS = "--column source=NAME --column target=NAME, or --column messages=NAME"


@dataclass(frozen=True)
class SourceTarget:
    """columns: role -> name, "source", "target" and perhaps "input", or "messages".   reason: why, in words.

    answered: rows have what is to be written; False where they are only to be predicted.
    """

    columns: Mapping[str, str]
    reason: str = ""
    answered: bool = True

    @classmethod
    def from_description(cls, columns: Mapping[str, Any]) -> Self:
        """As JSON has them.  Raises KeyError or ValueError."""
        names = {str(role): str(name) for role, name in dict(columns).items()}
        if not _are_whole(names):
            raise ValueError(f"columns {names} are not those of sources and targets")
        return cls(names)

    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with rows.  Raises DataError where a column is missing."""
        if not self._is_rendered:
            return wrong_texts(table, [self.columns[role] for role in ("source", "target") if role in self.columns])
        problems: dict[int, str] = {}
        for name in self.columns.values():
            table.column(name)  # one mistake, not one per row
        for i in range(len(table)):
            try:
                if not self._asked(self._turns(table, i)):
                    problems[i] = f'column "{self.columns["messages"]}": nothing stands before the last answer'
            except DataError as error:
                problems[i] = str(error)
        return problems

    def sources(self, table: Table) -> Sequence[str]:
        """What is read, of each row."""
        if not self._is_rendered:
            return table.column(self.columns["source"])
        return _each(table, lambda i: in_lines(self._asked(self._turns(table, i))))

    def targets(self, table: Table) -> Sequence[str] | None:
        """What is to be written, of each row; None where the table has none."""
        if "messages" not in self.columns:
            return table.columns.get(self.columns.get("target", ""))
        if not self.answered:
            return None
        return _each(table, lambda i: next(t.content for t in reversed(self._turns(table, i)) if t.is_answer))

    def rows_of(self, sources: Sequence[str]) -> Table:
        """Sources that were given one by one, as a table."""
        if "messages" in self.columns:
            return said_rows(self.columns["messages"], [[{"role": "user", "content": text}] for text in sources])
        return said_rows(self.columns["source"], sources)

    def fitting(self, table: Table, *, labelled: bool) -> "SourceTarget":
        """The columns of another file, which may have other names.  Raises DataError."""
        if labelled:
            return self if set(self.columns.values()) <= set(table.columns) else source_and_target(table, {})
        if self.columns.get("messages") in table.columns:
            return SourceTarget(self.columns, answered=False)
        if self.columns.get("source") in table.columns:
            columns = {role: name for role, name in self.columns.items() if role != "target" and name in table.columns}
            return SourceTarget(columns, answered=False)
        return _source_alone(table)

    @property
    def _is_rendered(self) -> bool:
        """True where a source is made of more than one column's text."""
        return "messages" in self.columns or "input" in self.columns

    def _turns(self, table: Table, i: int) -> list[Turn]:
        columns = {_AS_SHAPE[role]: name for role, name in self.columns.items()}
        shape = Shape(kind="chat" if "messages" in columns else "completion", columns=columns)
        return shape.turns(table, i, answered=self.answered)

    def _asked(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns before the last answer; all, where none is needed and the last turn is no answer."""
        if not self.answered and not turns[-1].is_answer:
            return turns
        return turns[: max(i for i, turn in enumerate(turns) if turn.is_answer)]


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


def source_and_target(table: Table, said: Mapping[str, str]) -> SourceTarget:
    """What was said, a usual pair of names, translations, what a language model learns from, or the only two columns.

    said: role -> column.   Raises DataError.
    """
    for name in said.values():
        table.column(name)
    if set(said) == {"messages"}:
        return SourceTarget(dict(said), SAID)
    found = _recognised(table)
    if not said:
        if found is None:
            raise _unclear(table, "which text is written to which is not clear")
        return found
    pair = {} if found is None or "messages" in found.columns else dict(found.columns)
    first, second = pair.get("source"), pair.get("target")
    source, target = said.get("source"), said.get("target")
    source = source or (second if target == first else first)
    target = target or (first if source == second else second)
    if "messages" in said or source is None or target is None or source == target:
        raise _unclear(
            table, f"columns are said for {', '.join(said)}, and which text is written to which is not clear"
        )
    more = said.get("input") or (pair.get("input") if source == first and "source" not in said else None)
    columns = {"source": source, "input": more, "target": target}
    return SourceTarget({role: name for role, name in columns.items() if name is not None}, "goes with what you said")


def _recognised(table: Table) -> SourceTarget | None:
    """The columns by their names and contents; None where they do not tell."""
    if found := _usual(table):
        return found
    if len(table.names) == 2:
        return SourceTarget(dict(zip(("source", "target"), table.names, strict=True)), "the only two texts of a row")
    return None


def _usual(table: Table) -> SourceTarget | None:
    for source, target in _PAIRS:
        if {source, target} <= set(table.columns):
            return SourceTarget({"source": source, "target": target}, "usual names for a pair")
    languages = [name for name in table.columns if "." in name]
    if len(languages) == 2:
        return SourceTarget(dict(zip(("source", "target"), languages, strict=True)), "the only two translations")
    try:
        shape = recognise(table, {})
    except DataError:
        return None
    if shape.kind == "text":
        return None
    named = {role: shape.columns[there] for role, there in _AS_SHAPE.items() if there in shape.columns}
    return SourceTarget(named, shape.reason)


def _source_alone(table: Table) -> SourceTarget:
    """The sources of a table that perhaps has no targets.  Raises DataError."""
    if found := _usual(table):
        columns = {role: name for role, name in found.columns.items() if role != "target"}
        return SourceTarget(columns, found.reason, answered=False)
    names = [name for name in dict.fromkeys((*(source for source, _ in _PAIRS), *_ALONE)) if name in table.columns]
    names = names or table.names
    if len(names) != 1:
        raise DataError(f"which column holds the sources is not clear: {', '.join(names)}. Leave one")
    return SourceTarget({"source": names[0]}, answered=False)


def _are_whole(columns: Mapping[str, str]) -> bool:
    """True if the roles are those of a row with what is to be written."""
    roles = set(columns)
    return roles == {"messages"} or {"source", "target"} <= roles <= {"source", "input", "target"}


def _each(table: Table, get: Callable[[int], str]) -> Sequence[str]:
    return Lazy(lambda rows: [get(i) for i in rows], range(len(table)))


def _unclear(table: Table, what: str) -> DataError:
    return DataError(f"{what}: say it with {_FLAGS}. Columns: {', '.join(table.columns)}")
