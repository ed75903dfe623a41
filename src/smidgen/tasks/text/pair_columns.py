"""Rows that are a text, its pair, perhaps a wrong text, or a score: which column holds which, and what rows say.

Texts that differ in case or white space only are the same text, and have the same number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ...core.errors import DataError, RecipeError
from ...data.columns import guess_columns
from ...data.lazy import joined
from ...data.split import duplicate_groups
from ...data.table import Table
from ...data.values import number
from ..judging import seen_before
from .rows import wrong_texts

Side = Literal["text", "text_pair", "negative"]
SIDES: tuple[Side, ...] = get_args(Side)
ROLES = (*SIDES, "score")
_PAIRS = (("anchor", "positive"), ("query", "positive"), ("question", "positive"), ("query", "answer"))
_NEGATIVES = ("negative", "hard_negative")
_SCORES = ("score", "similarity", "similarity_score", "label")


@dataclass(frozen=True)
class PairColumns:
    """Role -> column, of those that are there."""

    names: Mapping[str, str]

    def sides(self, table: Table) -> list[Side]:
        """The texts that a row of this table has."""
        return [side for side in SIDES if self.names.get(side) in table.columns]

    def texts(self, table: Table) -> dict[Side, Sequence[str]]:
        return {side: table.column(self.names[side]) for side in self.sides(table)}

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """The texts of each row by side, as they are shown."""
        sides = self.texts(table)
        return [{side: texts[i] for side, texts in sides.items()} for i in range(len(table))]

    def remarks(self, train: Table, test: Table) -> list[str]:
        """`Task.remarks`: how many test rows have a text, or its pair, that stands in a training row too."""
        trained, judged = ([*self.texts(some).values()][:2] for some in (train, test))
        pairs = list(zip(*judged, strict=True))
        wanted = {text for pair in pairs for text in pair}
        seen = {text for texts in trained for text in texts if text in wanted}
        known = [next((text for text in pair if text in seen), None) for pair in pairs]
        return seen_before(seen, known, "rows, by one of their texts,")

    def numbers(self, table: Table) -> Tensor:
        """The number of each text, (N, S)."""
        sides = list(self.texts(table).values())
        return torch.tensor(duplicate_groups(joined(sides))).view(len(sides), -1).T

    def scores(self, table: Table) -> Tensor:
        """(N,); zeros where the table has none."""
        name = self.names.get("score")
        if name not in table.columns:
            return torch.zeros(len(table))
        return torch.tensor([float(cast(float, number(value))) for value in table.column(name)])

    def check(self, table: Table, *, differ: bool) -> dict[int, str]:
        """What is wrong with rows.   differ: the texts of a row have to."""
        names = [name for role, name in self.names.items() if role != "score"]
        problems = wrong_texts(table, names)
        for i, texts in enumerate(zip(*map(table.column, names), strict=True)):
            if differ and i not in problems and len(set(duplicate_groups(texts))) < len(texts):
                problems[i] = "two texts of the row are the same: there is nothing to tell apart"
        for i, value in enumerate(table.column(self.names["score"]) if "score" in self.names else ()):
            if number(value) is None:
                problems[i] = f'column "{self.names["score"]}": {value!r:.40} is no number'
        return problems


def pair_columns(
    table: Table, said: Mapping[str, str], *, scored: bool | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Role -> column and role -> why, in the order of `ROLES`; "negative" and "score" only where they are there.

    scored: whether there is to be a score; None leaves it to the columns.   Raises DataError or RecipeError.
    """
    for name in said.values():
        table.column(name)
    columns, reasons = dict(said), dict.fromkeys(said, "")
    pair = next((names for names in _PAIRS if set(names) <= set(table.columns)), None)
    if pair and not {"text", "text_pair"} & set(said):
        columns.update(text=pair[0], text_pair=pair[1])
        reasons.update(dict.fromkeys(ROLES[:2], f'"{pair[0]}" and "{pair[1]}" are a usual pair of names'))
    elif not {"text", "text_pair"} <= set(said):
        guess = guess_columns(table, text=said.get("text"), text_pair=said.get("text_pair"), allow_unlabelled=True)
        if guess.text_pair is None:
            raise DataError(
                "embeddings are learned from pairs of texts, and the second column is not clear. "
                f"Say both with --column text=NAME --column text_pair=NAME. There are: {', '.join(table.names)}"
            )
        for role, name in (("text", guess.text), ("text_pair", guess.text_pair)):
            columns.setdefault(role, name)
            reasons.setdefault(role, guess.reasons[role])
    left = [name for name in table.names if name not in columns.values()]
    negative = next((name for name in _NEGATIVES if name in left), None)
    if negative and not scored and "score" not in said and "negative" not in said:
        columns["negative"], reasons["negative"] = negative, f'"{negative}" is a usual name for wrong texts'
    score = next((name for name in _SCORES if name in left and _are_scores(table.column(name))), None)
    if score and scored is not False and "negative" not in columns and "score" not in said:
        columns["score"], reasons["score"] = score, f'"{score}" is a usual name, and it holds numbers'
    _fit(columns, scored)
    return {role: columns[role] for role in ROLES if role in columns}, reasons


def score_range(scores: Sequence[Any]) -> tuple[float, float]:
    """The scores that stand for the cosines 0 and 1: where all are between -1 and 1 already, they are cosines."""
    found = [value for score in scores if (value := number(score)) is not None]
    if not found or max(map(abs, found)) <= 1:
        return 0.0, 1.0
    return min(0.0, *found), max(found)


def _fit(columns: Mapping[str, str], scored: bool | None) -> None:
    if "score" in columns and "negative" in columns:
        raise RecipeError("a row has a score or a wrong text (negative), not both: leave out one of the columns")
    if scored and "score" not in columns:
        raise RecipeError("this loss needs the score of each pair: say its column with --column score=NAME")
    if scored is False and "score" in columns:
        raise RecipeError("the loss contrastive takes pairs that belong together; it has no use for a column of scores")


def _are_scores(values: Sequence[Any]) -> bool:
    """True if most are numbers, and not all the same; the others are then bad rows."""
    found = [value for score in values if (value := number(score)) is not None]
    return len(found) > 0.5 * len(values) and len(set(found)) > 1
