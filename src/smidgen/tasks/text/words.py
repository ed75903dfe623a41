"""Words and their sub-words: a row of words for the model, and where each word begins in it.

A text that nobody has split becomes words by `split_words`: runs of letters and digits, abbreviations, single marks.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ...core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"(?:\w\.){2,}|\w+(?:[-'.]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    """The words of a text that nobody has split."""
    return _WORD.findall(text)


class SubWords:
    """A tokenizer on rows of words.  Raises ModelError for one that does not say which sub-word is of which word."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not say which sub-word is of which word: it is no fast one"
            )
        self.tokenizer: Any = tokenizer
        # byte-level tokenizers take the space before a word as a part of it
        alone = self.tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        self.space = "" if self.tokenizer("a b", add_special_tokens=False)["input_ids"] == alone else " "

    def _encodings(self, rows: Sequence[list[str]], **how: Any) -> list[Any]:
        spaced = [[words[0], *(self.space + word for word in words[1:])] for words in rows]
        return cast("list[Any]", self.tokenizer(spaced, is_split_into_words=True, **how).encodings)

    def lengths(self, rows: Sequence[list[str]]) -> list[int]:
        """How many sub-words each row has, uncut."""
        return [len(encoding.ids) for encoding in self._encodings(rows, verbose=False)]

    def rows(self, rows: Sequence[list[str]], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
        """Per row "input_ids", and "words" that are in it, the first `max_length` of them at most, with the "firsts",
        where each begins; and how many rows were cut.
        """
        inputs, encodings = [], self._encodings(rows, truncation=True, max_length=max_length)
        for encoding in encodings:
            firsts: dict[int, int] = {}  # word -> its first sub-word; a word may have none
            for position, word in enumerate(encoding.word_ids):
                if word is not None and word < max_length:
                    firsts.setdefault(word, position)
            inputs.append({"input_ids": encoding.ids, "words": list(firsts), "firsts": list(firsts.values())})
        return inputs, sum(bool(encoding.overflowing) for encoding in encodings)
