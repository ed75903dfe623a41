"""YAML as plain data: text, numbers, true and false, null, lists and mappings, each with its line; and the way back.

Numbers are read as YAML 1.2 has it: 2e-4 is a number and 010 is ten; yes and on are words, 2024-01-01 and 1:30 too.
Tags, anchors and aliases are refused: they make objects, or a small file large, and a recipe needs none.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

Loc = tuple[str | int, ...]

# tag, pattern of the plain words that have it, what such a word may begin with ("" is nothing at all), how it is read
_WORDS: list[tuple[str, str, list[str], Any]] = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]{1,30}", list("-+0123456789"), int),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?", list("-+.0123456789"), float),
]
_TAG = "tag:yaml.org,2002:"
_READ = {_TAG + tag: read for tag, _, _, read in _WORDS}
_RESOLVERS = {
    first: [(_TAG + tag, re.compile(f"(?:{pattern})$")) for tag, pattern, firsts, _ in _WORDS if first in firsts]
    for first in {first for _, _, firsts, _ in _WORDS for first in firsts}
}
_HINTS = {
    "found character '\\t' that cannot start any token": "a tab; YAML is indented with spaces",
    "mapping values are not allowed here": 'a ":" where none can be: is the line indented like its neighbours? '
    'A text with ": " in it goes in quotes',
    "could not find expected ':'": 'a key without ":" behind it',
}


@dataclass
class Document:
    """What a YAML text holds.   lines: where each key and item stands, from 1.   mistakes: (line, what is wrong)."""

    values: Any = None
    lines: dict[Loc, int] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)


def read_yaml(text: str) -> Document:
    """Read one YAML document; what is wrong is in its `mistakes`."""
    document = Document()
    try:
        node = _Loader(text).get_single_node()
        document.values = None if node is None else _plain(node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        if error.problem == "could not find expected ':'" and error.context_mark:
            mark = error.context_mark  # the key, not what follows it
        problem = error.problem or "it ends too early"
        document.mistakes.append((mark.line + 1 if mark else 1, f"not YAML: {_HINTS.get(problem, problem)}"))
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.mistakes.append((line, f"not YAML: the character U+{error.character:04X} is not allowed"))
    except RecursionError:
        document.mistakes.append((1, "nested too deeply"))
    return document


def read_scalar(text: str) -> Any:
    """One value as YAML would read it; what cannot be read so is the text itself."""
    document = read_yaml(text)
    return text if document.mistakes else document.values


def write_yaml(values: Any) -> str:
    """Plain data as YAML that `read_yaml` reads back equal."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _plain(node: Node, loc: Loc, document: Document) -> Any:
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[*loc, index] = item.start_mark.line + 1
        return [_plain(item, (*loc, index), document) for index, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        return _READ.get(node.tag, str)(node.value)
    values: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            document.mistakes.append((line, "a key is a word, not a list or a mapping"))
        elif key.value in values:
            first = document.lines[*loc, key.value]
            document.mistakes.append((line, f'"{key.value}" stands here again; it stands on line {first} already'))
        else:
            document.lines[*loc, key.value] = line
            values[key.value] = _plain(value, (*loc, key.value), document)
    return values


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "tags (!), anchors (&) and aliases (*) are not read; a text that begins so goes in quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        # in quotes and escaped: PyYAML writes U+0085 and its like as they are, and reads them as a space
        return self.represent_scalar(f"{_TAG}str", data, None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
