"""What pydantic found wrong with a recipe, in words that say what is there and what to write instead."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..core.errors import nearest
from ..core.method import method_named
from ..methods.lora import LoRA
from ..tasks.registry import task_said
from .method_part import MethodPart, TaskPart, method_fields, task_fields
from .part import MISTAKE
from .schema import PARTS, SHORT, Recipe
from .yaml_text import Loc

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "path_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys with values",
    "mapping_type": "keys with values",
    "model_type": "keys with values",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: ValidationError, values: Mapping[str, Any], flags: Mapping[str, str]) -> Iterator[tuple[Loc, str]]:
    """Where in `values` and what, for each mistake.   flags: flag -> key, to name the flag for what is missing."""
    grouped: dict[Loc, list[Any]] = {}
    for detail in error.errors(include_url=False):
        at = detail["loc"] if detail["type"] == "missing" else _part_that_is_there(detail["loc"], values)
        grouped.setdefault(at, []).append(detail)  # the branches of a union are one mistake
    for loc, details in grouped.items():
        kinds = {detail["type"] for detail in details}
        if kinds <= {MISTAKE}:
            yield from ((loc, str(detail["msg"])) for detail in details)
        elif "missing" in kinds:
            yield loc, _missing(".".join(map(str, loc)), flags)
        elif "extra_forbidden" in kinds:
            yield loc, _unknown(loc, values)
        else:
            yield loc, f"{'.'.join(map(str, loc))} is {_wrong(_value_at(loc, values), loc, details)}"


def shown(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "keys with values"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return (text if len(text) <= 60 else f"{text[:57]}...") + (" (text)" if isinstance(value, str) else "")


def _wrong(value: Any, loc: Loc, details: Sequence[Any]) -> str:
    kind, context = details[0]["type"], details[0].get("ctx", {})
    if kind in _EXPECTED:
        expected = " or ".join(dict.fromkeys(_expected(detail, loc) for detail in details))
        quotes = f': write "{value}" in quotes' if "text" in expected and isinstance(value, int | float) else ""
        return f"{shown(value)}; expected {expected}{quotes}"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"{shown(value)}; it must be {word} {context[bound]:g}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        near = nearest(str(value), choices, count=1)
        hint = f'. Did you mean "{near[0]}"?' if near else ""
        return f"{shown(value)}; it can be {' or '.join(choices)}{hint}"
    return "empty" if kind == "string_too_short" else f"{shown(value)}: {details[0]['msg']}"


def _expected(detail: Any, loc: Loc) -> str:
    word = _EXPECTED.get(detail["type"], detail["msg"])
    in_list = any(isinstance(key, int) for key in detail["loc"][len(loc) :])
    return f"a list of {word}s".replace("texts", "text") if in_list else word


def _unknown(loc: Loc, values: Mapping[str, Any]) -> str:
    key, where = str(loc[-1]), ".".join(map(str, loc[:-1]))
    if where == "method":
        owner, noun = values["method"].get("name", MethodPart().name), "field"
        keys = method_fields(method_named(owner))
    elif where == "task":
        owner, noun = values["task"].get("name", TaskPart().name), "key"
        keys = ["name", *task_fields(owner)]
    else:
        owner, noun = where or "a recipe", "key"
        keys = list((PARTS[where] if where else Recipe).model_fields)
    near = nearest(key, keys, count=1)
    homes = [name for name, part in PARTS.items() if key in part.model_fields and name != where]
    if where != "method" and key in method_fields(LoRA):
        homes.append("method")
    elif where == "data" and key in task_said(values.get("task", {}).get("name", TaskPart().name)).roles:
        homes.append("data.columns")
    hint = f" It is a key of {homes[0]}." if homes else f' Did you mean "{near[0]}"?' if near else ""
    return f'"{key}" is not a {noun} of {owner}.{hint} {noun.capitalize()}s: {", ".join(keys)}'


def _missing(name: str, flags: Mapping[str, str]) -> str:
    dotted = f"{name}.{SHORT[name]}" if name in SHORT else name
    said = [flag for flag, key in flags.items() if key == dotted]
    ways = [f'"{name}: PATH" in a recipe'] * ("." not in name) + [f"{flag} PATH" for flag in said]
    return f"{name} is missing" + (f"; say it with {', or '.join(ways)}" if ways else "")


def _part_that_is_there(loc: Loc, values: Mapping[str, Any]) -> Loc:
    """The part of a location that the values have; what follows are pydantic's names for the branches of a union."""
    value: Any = values
    for depth, key in enumerate(loc):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _value_at(loc: Loc, values: Mapping[str, Any]) -> Any:
    value: Any = values
    for key in loc:
        value = value[key]
    return value
