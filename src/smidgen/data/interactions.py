"""Interactions of users with items: which column is what, features of users and items, and splits that respect time.

    user,item,rating,time          one row for each time that a user took an item; rating and time may be absent
    id,genres,year                 features of users or items: an id, and columns of words, "Action|Comedy" for several

Ids are names: 7, 7.0 and "7" are the same user.  Times are numbers, or dates in ISO 8601.
"""

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from smidgen.core.errors import DataError, nearest
from smidgen.data.table import Table
from smidgen.data.values import class_name, number, wrong_time

ROLES = ("user", "item", "rating", "time")
_USUAL = {
    "user": ("user", "user_id", "userid", "uid", "customer", "customer_id", "session", "session_id"),
    "item": ("item", "item_id", "itemid", "iid", "movie_id", "movieid", "product", "product_id", "article_id"),
    "rating": ("rating", "ratings", "stars", "score"),
    "time": ("time", "timestamp", "datetime", "date"),
}
_NEEDED = ("user", "item")


def interaction_columns(table: Table, said: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Role -> column, and role -> why: what was said, else the usual names.  Raises DataError if that is not clear."""
    columns, reasons, wrong = dict(said), dict.fromkeys(said, "you said so"), []
    for role, name in said.items():
        if name not in table.columns:
            near = nearest(name, table.names)
            wrong.append(f'{role} "{name}" is not a column.' + (f' Did you mean "{near[0]}"?' if near else ""))
    for role in [role for role in ROLES if role not in said]:
        found = [name for name in table.names if name not in said.values() and _plain(name) in _USUAL[role]]
        if len(found) == 1:
            columns[role], reasons[role] = found[0], f'"{found[0]}" is a usual name'
        elif role in _NEEDED:
            there = f"could be {' or '.join(found)}" if found else "has no usual name"
            wrong.append(f"The column of the {role} {there}; say which: --column {role}=NAME.")
    if wrong:
        raise DataError(f"{' '.join(wrong)} Columns: {', '.join(table.names)}.")
    return columns, reasons


def identity(value: Any) -> str:
    """The name of a user or an item; "" for none."""
    return "" if value is None else class_name(value)


def check_interaction(row: Mapping[str, Any], *, as_numbers: bool) -> str | None:
    """What is wrong with the values of one row, by role.   as_numbers: whether times are numbers; dates otherwise."""
    for role in _NEEDED:
        if role in row and not identity(row[role]):
            return f"no {role}"
    if "rating" in row and number(row["rating"]) is None:
        return f'rating "{row["rating"]}" is not a number'
    if "time" in row and (what := wrong_time(row["time"], as_numbers=as_numbers)):
        return f"time {what}"
    return None


def read_features(table: Table) -> dict[str, list[str]]:
    """Id -> its features as "column=word".  The id is the first column; "a|b" and lists are several words.

    Columns whose values are nearly all different (names, titles) say nothing about others and are left out.
    """
    ids = [identity(value) for value in table.column(table.names[0])]
    features: dict[str, list[str]] = {name: [] for name in ids}
    for column in table.names[1:]:
        words = [_words(value) for value in table.column(column)]
        different = {word for some in words for word in some}
        if 2 * len(different) > len(ids):
            continue
        for name, some in zip(ids, words, strict=True):
            features[name] += [f"{column}={word}" for word in some]
    return features


def leave_one_out(users: Sequence[Hashable], times: Sequence[float]) -> tuple[list[int], list[int]]:
    """Indices of the rows that stay, and of each user's last one; users with a single row keep it."""
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for i, user in enumerate(users):
        rows[user].append(i)
    held = {max(some, key=lambda i: (times[i], i)) for some in rows.values() if len(some) > 1}
    return _apart(len(users), held)


def latest(times: Sequence[float], fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the rows that stay, and of the latest `fraction` of all."""
    order = sorted(range(len(times)), key=lambda i: (times[i], i))
    return _apart(len(times), set(order[len(order) - max(1, round(fraction * len(order))) :]))


def at_random(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows that stay, and of `fraction` of them drawn by the seed."""
    return _apart(count, set(random.Random(seed).sample(range(count), max(1, round(fraction * count)))))


class Histories:
    """What each user took, in order of time.   users, items: rows of tables.   times: of equal ones the first leads."""

    def __init__(self, users: Sequence[int], items: Sequence[int], times: Sequence[float]) -> None:
        self._items: dict[int, list[int]] = defaultdict(list)
        self._times: dict[int, list[float]] = defaultdict(list)
        for i in sorted(range(len(users)), key=lambda i: times[i]):
            self._items[users[i]].append(items[i])
            self._times[users[i]].append(times[i])

    def items(self, user: int) -> list[int]:
        """All that a user took, the oldest first."""
        return self._items.get(user, [])

    def count_before(self, user: int, time: float) -> int:
        """How many of them are older than `time`."""
        return bisect_left(self._times.get(user, []), time)


def _apart(count: int, held: set[int]) -> tuple[list[int], list[int]]:
    if not held or len(held) == count:
        raise DataError(
            f"{count} interactions cannot be split: {len(held)} would judge and the rest train. Users need two "
            "interactions at least; give a test file, or task.split: random"
        )
    return [i for i in range(count) if i not in held], sorted(held)


def _words(value: Any) -> list[str]:
    parts = value if isinstance(value, list) else str("" if value is None else value).split("|")
    return [name for part in parts if (name := class_name(part))]


def _plain(name: str) -> str:
    return re.sub(r"[\s.-]+", "_", name.strip().lower())
