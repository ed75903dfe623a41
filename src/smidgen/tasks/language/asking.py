"""What a row of texts, prompts or chats is to a language model: its tokens, which of them are learned, what it asks.

Of prompts and chats the answers are learned and what ends them, or all; of plain texts everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch import nn

from ...core.errors import DataError
from ...data.conversations import Shape, before_answer, in_lines, recognise
from ...data.lazy import Lazy
from ...data.table import Table
from ..loading import Tokenizer
from .chat_template import answers_in, encoded, rendered
from .saying import opening, question, say
from .token_rows import IGNORED, Tokens

_OPENING, _GOES_ON = 60, 200  # characters of a text that is to go on, and of how it does
_SAID = 48  # tokens of a sample


@dataclass(frozen=True)
class AskingRows:
    """Rows of one shape, read with a tokenizer and its chat template.   learns_all: prompts are learned too.

    Of plain texts all is learned in any case.
    """

    tokenizer: Tokenizer
    shape: Shape
    learns_all: bool

    def fitting(self, table: Table, *, said: bool = True) -> Self:
        """Rows of another table, which may be of another shape.

        said: these columns were said, so they stand where the table has them; else its own names and contents tell, and
        these columns where they do not.   Raises DataError where its shape is not clear.
        """
        has_them = all(name in table.columns for name in self.shape.columns.values())
        if said and has_them:
            return self
        try:
            return replace(self, shape=recognise(table, {}))
        except DataError:
            if has_them:
                return self
            raise

    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with rows.  Raises DataError where a column is missing."""
        problems: dict[int, str] = {}
        for name in self.shape.columns.values():
            table.column(name)  # one mistake, not one per row
        for i in range(len(table)):
            try:
                self._rendered(table, i)
            except DataError as error:
                problems[i] = str(error)
        return problems

    def _rendered(self, table: Table, i: int) -> tuple[str, Any]:
        """Row i as text, and the spans of its answers in it, None where all is learned.  Raises DataError."""
        if self.shape.kind == "text":
            return self.shape.text(table, i), None
        turns = self.shape.turns(table, i)
        if self.learns_all:
            return rendered(self.tokenizer, turns, asks=False), None
        return answers_in(self.tokenizer, turns)

    def tokens(self, table: Table) -> list[Tokens]:
        """All rows as tokens, uncut."""
        rows = [self._rendered(table, i) for i in range(len(table))]
        if self.shape.kind != "text":
            return encoded(self.tokenizer, [text for text, _ in rows], [spans for _, spans in rows])
        found: Any = cast(Any, self.tokenizer)([text for text, _ in rows], verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        ids = [row if end is None or row[-1:] == [end] else [*row, end] for row in found]
        return [(row, [IGNORED, *row[1:]]) for row in ids]

    def asked(self, table: Table) -> Sequence[str]:
        """What makes rows the same: the whole text, or all before the first answer."""
        if self.shape.kind == "text":
            return table.column(self.shape.columns["text"])
        return Lazy(lambda rows: [self.prompt(table, i) for i in rows], range(len(table)))

    def prompt(self, table: Table, i: int) -> str:
        """What a model is asked in a row, in words: all before the first answer, or how a text begins."""
        if self.shape.kind == "text":
            return self.shape.text(table, i)[:_OPENING].rpartition(" ")[0] or self.shape.text(table, i)[:_OPENING]
        return in_lines(before_answer(self.shape.turns(table, i)))

    def truth(self, table: Table, i: int) -> str:
        """The first answer, or how the text goes on."""
        if self.shape.kind == "text":
            return self.shape.text(table, i)[len(self.prompt(table, i)) :][:_GOES_ON].strip()
        return next(turn.content for turn in self.shape.turns(table, i) if turn.is_answer)

    def said(self, body: nn.Module, table: Table, rows: Sequence[int], size: int) -> list[str]:
        """What the model says to the prompts of these rows: the likeliest token each time, 48 tokens at most.

        Of a prompt of more than `size` tokens the last are read, and fewer where the model has no positions for these
        and what it says.
        """
        found = []
        for i in rows:
            if self.shape.kind == "text":
                ids = opening(self.tokenizer, self.prompt(table, i))
            else:
                ids = question(self.tokenizer, before_answer(self.shape.turns(table, i)))
            found.append(say(body, self.tokenizer, ids[-size:], _SAID))
        return found


def in_words(shape: Shape) -> str:
    words = {"text": "plain texts", "completion": "prompts and completions", "chat": "chats"}
    return f"{words[shape.kind]} ({', '.join(shape.columns.values())})"
