"""Rows that a language model learns from, in the shapes that public data sets have, as one: a text, or turns.

    text         {"text": "..."}
    completion   {"prompt": "...", "completion": "..."}             Alpaca's {"instruction", "input", "output"}
    chat         {"messages": [{"role": "user", "content": "..."}]}    ShareGPT's {"conversations": [{"from", "value"}]}

A prompt and its completion are a turn of the user and one of the assistant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..core.errors import DataError, nearest
from .labels import check_text
from .table import Table

Kind = Literal["text", "completion", "chat"]
SAID = "you said so"  # the reason of a shape whose columns were said
ROLES = ("text", "prompt", "input", "completion", "messages")  # of columns; input: more of the prompt, or empty

_TEXTS = ("text", "content", "document", "body", "sentence", "article", "story", "code")
_PROMPTS = (  # prompt, completion
    ("prompt", "completion"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("query", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("prompt", "answer"),
    ("input", "output"),
    ("user", "assistant"),
)
_INPUTS = ("input", "context")  # beside an instruction: Alpaca's and Dolly's name
_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
}
_FLAGS = "--column text=NAME, or --column prompt=NAME --column completion=NAME, or --column messages=NAME"


@dataclass(frozen=True)
class Turn:
    """What one side says.   role: "system", "user", "assistant" or "tool"."""

    role: str
    content: str

    @property
    def is_answer(self) -> bool:
        """True for what a model is to say."""
        return self.role == "assistant"


def before_answer(turns: Sequence[Turn]) -> list[Turn]:
    """The turns before the first answer."""
    return list(turns[: [turn.is_answer for turn in turns].index(True)])


def in_lines(turns: Sequence[Turn]) -> str:
    """Turns as plain text: what one turn says, or of several a line for each, "user: Hi"."""
    return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a table's rows.   columns: role -> name.   reason: why, in words."""

    kind: Kind
    columns: Mapping[str, str]
    reason: str = ""

    @classmethod
    def from_description(cls, kind: Any, columns: Mapping[str, Any]) -> Self:
        """As JSON has them.  Raises KeyError or ValueError."""
        names = {str(role): str(name) for role, name in dict(columns).items()}
        needed = {"text": {"text"}, "completion": {"prompt", "completion"}, "chat": {"messages"}}[kind]
        if not needed <= set(names) <= set(ROLES):
            raise ValueError(f"columns {names} are not those of {kind}")
        return cls(kind=kind, columns=names)

    def text(self, table: Table, i: int) -> str:
        """The text of row i, of kind "text".  Raises DataError saying what is wrong with it."""
        return _text(table, i, self.columns["text"])

    def turns(self, table: Table, i: int, *, answered: bool = True) -> list[Turn]:
        """The turns of row i.   answered: one of them at least is the assistant's; else that may be missing.

        Raises DataError saying what is wrong with the row.
        """
        if self.kind == "completion":
            prompt = _text(table, i, self.columns["prompt"])
            more = table.column(self.columns["input"])[i] if "input" in self.columns else None
            if more is not None and more != "":
                prompt += "\n\n" + _text(table, i, self.columns["input"])
            asked = [Turn("user", prompt)]
            if not answered:
                return asked
            return [*asked, Turn("assistant", _text(table, i, self.columns["completion"]))]
        column = self.columns["messages"]
        try:
            return _turns(table.column(column)[i], answered)
        except DataError as error:
            raise DataError(f'column "{column}": {error}') from None


def recognise(table: Table, said: Mapping[str, str]) -> Shape:
    """The shape of a table's rows, by the columns said, else by the names and contents of its columns.

    said: role -> column.   Raises DataError if a column is not there, or the shape is not clear.
    """
    for name in said.values():
        table.column(name)
    if said:
        return _said(table, said)
    if found := [name for name in table.names if _holds_messages(table.column(name))]:
        named = [name for name in _MESSAGES if name in found] or found
        if len(named) > 1 and named == found:
            raise _unclear(table, f"{' and '.join(named)} all hold messages")
        return Shape(kind="chat", columns={"messages": named[0]}, reason=f'"{named[0]}" holds lists of messages')
    for prompt, completion in _PROMPTS:
        if prompt in table.columns and completion in table.columns:
            columns = {"prompt": prompt, "completion": completion}
            more = [name for name in _INPUTS if name in table.columns and name != prompt]
            if prompt == "instruction" and more:
                columns["input"] = more[0]
            both = f'"{prompt}" and "{completion}" are usual names'
            return Shape(kind="completion", columns=columns, reason=f"{both} of a prompt and its completion")
    texts = [name for name in table.names if any(isinstance(value, str) for value in table.column(name)[:100])]
    if usual := next((name for name in _TEXTS if name in texts), None):
        return Shape(kind="text", columns={"text": usual}, reason=f'"{usual}" is a usual name for texts')
    if len(texts) == 1:
        return Shape(kind="text", columns={"text": texts[0]}, reason=f'"{texts[0]}" is the only column with text')
    raise _unclear(table, "no column has a usual name")


def _said(table: Table, said: Mapping[str, str]) -> Shape:
    roles = set(said)
    reason = SAID
    if roles == {"text"}:
        return Shape(kind="text", columns=dict(said), reason=reason)
    if roles == {"messages"}:
        return Shape(kind="chat", columns=dict(said), reason=reason)
    if {"prompt", "completion"} <= roles <= {"prompt", "completion", "input"}:
        return Shape(kind="completion", columns=dict(said), reason=reason)
    raise _unclear(table, f"columns are said for {', '.join(said)}, which is none of the shapes")


def _unclear(table: Table, what: str) -> DataError:
    listing = "; ".join(f'"{name}" ({table.column(name)[0]!r:.40})' for name in table.names)
    return DataError(
        f"It is not clear what a language model is to learn from these rows: {what}. Say it with {_FLAGS}. "
        f"Columns: {listing}"
    )


def _holds_messages(values: Sequence[Any]) -> bool:
    """True if the first list that is not empty has something with a role in it."""
    first = next((value for value in values if isinstance(value, list) and value), [None])[0]
    return isinstance(first, dict) and ("role" in first or "from" in first)


def _text(table: Table, i: int, column: str) -> str:
    value = table.column(column)[i]
    if what := check_text(value):
        raise DataError(f'column "{column}": {what}')
    return str(value)


def _turns(messages: Any, answered: bool) -> list[Turn]:
    if not isinstance(messages, list):
        raise DataError(f"not a list of messages but {messages!r:.40}")
    if not messages:
        raise DataError("the list of messages is empty")
    turns = [_turn(message, f"message {n}") for n, message in enumerate(messages, start=1)]
    if answered and not any(turn.is_answer for turn in turns):
        raise DataError("there is no message of the assistant, so nothing to learn")
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} is not an object with a role and a content but {message!r:.40}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    known = _SPEAKERS.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        near = nearest(role, _SPEAKERS, 1) if isinstance(role, str) else []
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise DataError(f"{where} has the role {role!r}, which is not known.{hint} Roles: {', '.join(_SPEAKERS)}")
    if message.get("tool_calls"):
        raise DataError(f"{where} calls tools, and only text is learned from")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{where} holds more than text")
        content = "".join(map(str, parts))
    if what := check_text(content):
        raise DataError(f"{where}: {what}")
    return Turn(known, str(content))
