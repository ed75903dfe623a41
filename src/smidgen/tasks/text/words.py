"""Words and their sub-words: a row of words for the model, and where each word begins in it.

A text that nobody has split becomes words by `split_words`: runs of letters and digits, abbreviations, single marks.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from ...core.errors import ModelError
from ..base import Batch, Examples
from ..loading import Tokenizer
from .padding import padded
from .spans import NO_TAG

_WORD = re.compile(r"(?:\w\.){2,}|\w+(?:[-'.]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    """The words of a text that nobody has split."""
    return _WORD.findall(text)


class SubWords:
    """A tokenizer on rows of words.  Raises ModelError for one that does not say which sub-word is of which word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
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

    def examples(self, rows: Sequence[list[str]], tags: Tensor, max_length: int) -> Examples:
        """Rows ready for the model: "input_ids", the "words" in it, the first `max_length` of them at most, and where
        each begins, "firsts".   tags: (N, W), the targets.
        """
        inputs, encodings = [], self._encodings(rows, truncation=True, max_length=max_length)
        for encoding in encodings:
            firsts: dict[int, int] = {}  # word -> its first sub-word; a word may have none
            for position, word in enumerate(encoding.word_ids):
                if word is not None and word < max_length:
                    firsts.setdefault(word, position)
            inputs.append({"input_ids": encoding.ids, "words": list(firsts), "firsts": list(firsts.values())})
        cut = sum(bool(encoding.overflowing) for encoding in encodings)
        return Examples(inputs, tags, [len(row["input_ids"]) for row in inputs], cut)

    def batch(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """firsts: where the first sub-word of each word is, words: which word that is, targets: its tag; each (N, T),
        -1 and NO_TAG beyond them.
        """
        batch = padded(examples, indices, {"input_ids": self.tokenizer.pad_token_id or 0, "words": -1, "firsts": -1})
        beside = examples.targets_at(indices)
        tags = beside["targets"].gather(1, batch["words"].clamp_min(0))
        return {**batch, **beside, "targets": tags.where(batch["words"] >= 0, NO_TAG)}

    @staticmethod
    def tags(outputs: Tensor, batch: Batch, width: int) -> Tensor:
        """The likeliest tag of each word (rows, width), NO_TAG where it was cut off.   outputs: (M, K), by word."""
        words = batch["words"]
        rows, places = (words >= 0).nonzero(as_tuple=True)
        tags = words.new_full((len(words), width), NO_TAG)
        tags[rows, words[rows, places]] = outputs.argmax(1)
        return tags
