"""HTML and SVG as nested calls, escaped by construction: text is data unless it was made by `element`."""

import html
import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not allowed in a document


class Markup(str):
    """Text that is markup already; only `element` and `join` make it."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """`<name attributes>children</name>`; children that are not Markup are escaped.

    Attribute names: a trailing underscore falls away (`class_`), the others become hyphens (`stroke_width`).
    """
    inside = "".join(f' {_name(key)}="{_escape(_number(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{inside}>{join(*children)}</{name}>" if children else f"<{name}{inside}/>")


def join(*children: str) -> Markup:
    """The children one after another; those that are not Markup are escaped."""
    return Markup("".join(child if isinstance(child, Markup) else _escape(child) for child in children))


def _name(key: str) -> str:
    return key.removesuffix("_").replace("_", "-")


def _number(value: str | float) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\ufffd", text), quote=True)
