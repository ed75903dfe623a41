"""Which column is the text, which the second text of a pair, and which the label.

First what the user said, then the names that public data sets use, then the content.  Where two columns fit equally
well nothing is guessed: the error shows every column with an example, and the flag that settles it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smidgen.core.errors import DataError, nearest
from smidgen.data.table import Table
from smidgen.data.values import number

_PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence_a", "sentence_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
]
# the first of each decides at once; of the others only one may be there
_TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "message",
    "snippet",
    "comment",
    "tweet",
    "document",
    "post",
    "utterance",
    "headline",
)
_LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "score",
    "rating",
    "stars",
    "topic",
    "intent",
    "emotion",
)
_FLAGS = {"text": "--text-column", "text_pair": "--text-pair-column", "label": "--label-column"}
_SAMPLE = 2000  # rows looked at


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The chosen columns, and for each in words why.   reasons: role ("text", "text_pair", "label") -> why."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def fitting(self, table: Table, *, labelled: bool) -> "Columns":
        """The columns of another file, which may have other names; without a label where nothing is judged."""
        columns, wanted = self, (self.text, self.text_pair, self.label if labelled else None)
        if any(name is not None and name not in table.columns for name in wanted):
            columns = guess_columns(table, allow_unlabelled=not labelled)
        return columns if labelled else replace(columns, label=None)


def guess_columns(
    table: Table,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    allow_unlabelled: bool = False,
) -> Columns:
    """Choose the columns of `table`; those that are given stand.

    allow_unlabelled: then a label is taken only if it was given or has a usual name, and may be absent.
    Raises DataError if a given name is not there, or the choice is not clear.
    """
    given = {"text": text, "text_pair": text_pair, "label": label}
    _check_given(table, given)
    chosen = {role: name for role, name in given.items() if name is not None}
    reasons = {role: f"{_FLAGS[role]} says so" for role in chosen}
    facts = {name: _Facts.of(values[:_SAMPLE]) for name, values in table.columns.items()}

    def free() -> list[str]:
        return [name for name in table.names if name not in chosen.values() and not facts[name].is_blank]

    def choose(role: str, name: str, reason: str) -> None:
        chosen[role], reasons[role] = name, reason

    if label is None and (name := _by_name(table, "label", _LABELS, free())):
        choose("label", name, f'"{name}" is a usual name for labels')
    if text is None and text_pair is None and (pair := _known_pair(free(), facts)):
        choose("text", pair[0], f'"{pair[0]}" and "{pair[1]}" are a usual pair of names')
        choose("text_pair", pair[1], reasons["text"])
    if "text" not in chosen:
        texts = [name for name in free() if facts[name].is_text]
        if name := _by_name(table, "text", _TEXTS, texts):
            choose("text", name, f'"{name}" is a usual name for texts')
        else:
            name = _longest(table, texts, facts)
            choose("text", name, f'"{name}" has the longest texts, {facts[name].length:.0f} characters on average')
    if "label" not in chosen and not allow_unlabelled:
        labels = [name for name in free() if facts[name].is_label]
        if len(labels) != 1:
            found = f"{' and '.join(labels)} could all be it" if labels else "none looks like it"
            raise _unclear(table, "label", f"has no usual name, and {found}")
        choose("label", labels[0], f'"{labels[0]}" is the only other column with {facts[labels[0]].why_label}')
    return Columns(text=chosen["text"], text_pair=chosen.get("text_pair"), label=chosen.get("label"), reasons=reasons)


@dataclass(frozen=True)
class _Facts:
    """What the values of a column look like."""

    is_blank: bool  # nothing in it
    is_text: bool  # strings that are not numbers
    has_spaces: bool  # in most of its strings
    length: float  # characters, mean
    distinct: int
    is_score: bool  # numbers, some not whole
    is_list: bool
    count: int

    @classmethod
    def of(cls, values: Sequence[Any]) -> "_Facts":
        filled = [value for value in values if value is not None and value != ""]
        strings = [value for value in filled if isinstance(value, str)]
        numbers = [found for value in filled if (found := number(value)) is not None]
        words = sum(number(string) is None for string in strings)
        return cls(
            is_blank=not filled,
            is_text=2 * words > len(filled),
            has_spaces=2 * sum(" " in string.strip() for string in strings) > len(strings),
            length=sum(map(len, strings)) / max(1, len(strings)),
            distinct=len(set(map(str, filled))),
            is_score=2 * len(numbers) > len(filled) and any(found % 1 for found in numbers),
            is_list=2 * sum(isinstance(value, list) for value in filled) > len(filled),
            count=len(filled),
        )

    @property
    def is_label(self) -> bool:
        is_class = 2 <= self.distinct <= max(2, self.count // 4) and self.length < 60
        return is_class or self.is_score or self.is_list

    @property
    def why_label(self) -> str:
        if self.is_list:
            return "lists of classes"
        return "numbers that are not whole" if self.is_score else f"few different values ({self.distinct})"


def _plain(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())


def _by_name(table: Table, role: str, known: Sequence[str], among: Sequence[str]) -> str | None:
    """The column with a known name; the first known name wins over all others.  Raises DataError for several others."""
    found = [name for name in among if _plain(name) in known]
    first = [name for name in found if _plain(name) == known[0]] or found
    if len(first) > 1:
        raise _unclear(table, role, f"could be {' or '.join(first)}")
    return first[0] if first else None


def _known_pair(names: Sequence[str], facts: dict[str, _Facts]) -> tuple[str, str] | None:
    plain = {_plain(name): name for name in names if facts[name].is_text}
    for first, second in _PAIRS:
        # an "answer" of yes and no is a label, not a text
        if (
            first in plain
            and second in plain
            and not 2 <= facts[plain[second]].distinct <= facts[plain[second]].count // 4
        ):
            return plain[first], plain[second]
    return None


def _longest(table: Table, texts: Sequence[str], facts: dict[str, _Facts]) -> str:
    """The column with the longest strings, if it is clear.  Raises DataError if there is none, or a second is near."""
    with_spaces = [name for name in texts if facts[name].has_spaces]  # keys and addresses have none
    ranked = sorted(with_spaces or texts, key=lambda name: -facts[name].length)
    if not ranked:
        raise _unclear(table, "text", "has no usual name, and no other column holds text")
    if len(ranked) > 1 and facts[ranked[1]].length > facts[ranked[0]].length / 2:
        raise _unclear(table, "text", f"could be {ranked[0]} or {ranked[1]}")
    return ranked[0]


def _check_given(table: Table, given: dict[str, str | None]) -> None:
    wrong = []
    for role, name in given.items():
        if name is not None and name not in table.columns:
            near = nearest(name, table.names)
            wrong.append(f'{_FLAGS[role]} "{name}" is not a column.' + (f' Did you mean "{near[0]}"?' if near else ""))
    names = [name for name in given.values() if name is not None]
    wrong += [f'"{name}" is given for two roles.' for name in dict.fromkeys(names) if names.count(name) > 1]
    if wrong:
        raise DataError(" ".join(wrong) + _listing(table))


def _unclear(table: Table, role: str, what: str) -> DataError:
    word = role.replace("_", " ")
    return DataError(f"The {word} column is not clear: it {what}. Say which with {_FLAGS[role]} NAME.{_listing(table)}")


def _listing(table: Table) -> str:
    lines = []
    for name, values in table.columns.items():
        example = next((str(value) for value in values if value not in (None, "")), "(nothing)")
        lines.append(f"\n  {name}: {example if len(example) <= 60 else example[:57] + '...'}")
    return " Columns, each with an example:" + "".join(lines)
