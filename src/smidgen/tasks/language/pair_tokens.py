"""Sources and targets as tokens: with their prefix, in their languages, and cut so that their ends stay.

A tokenizer of many languages (mBART, NLLB, M2M100) marks a text with its language's token, and the model begins to
write with that of the target: it is the first token after the start, or, in mBART-25, the start itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...core.errors import RecipeError, nearest
from ..base import Batch, Examples
from ..loading import Tokenizer
from .token_rows import IGNORED


@dataclass(frozen=True)
class PairTokens:
    """A tokenizer for pairs.   prefix: put before each source.   languages: of source and target, or None.

    Raises RecipeError where the tokenizer wants to be told languages and is not, or the other way round.
    """

    tokenizer: Tokenizer
    prefix: str = ""
    languages: tuple[str | None, str | None] = (None, None)

    def __post_init__(self) -> None:
        kind, tokenizer = type(self.tokenizer).__name__, cast(Any, self.tokenizer)
        if not hasattr(tokenizer, "tgt_lang"):
            if any(self.languages):
                raise RecipeError(f"{kind} knows no languages: leave out task.source_language and task.target_language")
            return
        known = _languages(tokenizer)
        for name, language in zip(("source_language", "target_language"), self.languages, strict=True):
            if language is None:
                raise RecipeError(f"{kind} wants to be told languages: say task.{name}, one of {', '.join(known)}")
            if language not in known:
                mean = " or ".join(nearest(language, known)) or ", ".join(known)
                raise RecipeError(f'task.{name}: {kind} does not know "{language}". Near it: {mean}')
        tokenizer.src_lang, tokenizer.tgt_lang = self.languages

    def of(self, sources: Sequence[str], targets: Sequence[str] | None) -> tuple[list[list[int]], list[list[int]]]:
        """Sources and targets, uncut, their ends with them; one ignored token each for no targets."""
        encode = cast(Any, self.tokenizer)
        found = encode([self.prefix + text for text in sources], verbose=False)["input_ids"]
        if targets is None:
            return found, [[IGNORED]] * len(sources)
        return found, encode(text_target=list(targets), verbose=False)["input_ids"]

    def examples(
        self,
        sources: Sequence[list[int]],
        targets: Sequence[list[int]],
        size: int,
        target_size: int,
        weights: Tensor | None = None,
    ) -> Examples:
        """Rows ready for the model, cut to sizes.   weights: (N,), what each row counts."""
        cut = sum(len(s) > size or len(t) > target_size for s, t in zip(sources, targets, strict=True))
        sources, targets = [self.cut(s, size) for s in sources], [self.cut(t, target_size) for t in targets]
        inputs = [{"input_ids": s, "targets": t} for s, t in zip(sources, targets, strict=True)]
        counts = [sum(token != IGNORED for token in target) for target in targets]
        lengths = [len(source) + len(target) for source, target in zip(sources, targets, strict=True)]
        return Examples(inputs, torch.tensor(counts), lengths, cut, weights)

    def batch(self, examples: Examples, indices: Sequence[int], written: int) -> Batch:
        """The rows at these indices as `Seq2SeqModel` takes them, each side padded to its longest.

        written: of all examples so many at most, evenly spread, are written to.
        """
        every = math.ceil(len(examples) / written) if written else 0

        def padded(name: str, filler: int) -> Tensor:
            rows = [torch.tensor(examples.inputs[i][name]) for i in indices]
            return pad_sequence(rows, batch_first=True, padding_value=filler)

        batch = {
            "input_ids": padded("input_ids", cast(int, self.tokenizer.pad_token_id)),
            "attention_mask": (padded("input_ids", -1) != -1).long(),
            "targets": padded("targets", IGNORED),
            "written": torch.tensor([every > 0 and i % every == 0 for i in indices]),
        }
        if examples.weights is not None:
            batch["weights"] = examples.weights[list(indices)]
        return batch

    def cut(self, ids: list[int], size: int) -> list[int]:
        """At most `size` tokens; the token that ends a text stays."""
        if len(ids) <= size:
            return ids
        return [*ids[: size - 1], ids[-1]] if ids[-1] in self.tokenizer.all_special_ids else ids[:size]

    def texts(self, ids: Tensor) -> list[str]:
        """Rows of tokens as texts; ignored ones are left out."""
        kept = ids.masked_fill(ids == IGNORED, cast(int, self.tokenizer.pad_token_id))
        return [text.strip() for text in cast(Any, self.tokenizer).batch_decode(kept, skip_special_tokens=True)]

    @property
    def begins(self) -> dict[str, int]:
        """Settings of generation by which a model writes in the target's language; none where there are no languages.

        Targets that end with the language's token are moved by their model, mBART-25, so that they start with it.
        """
        language = self.languages[1]
        if language is None:
            return {}
        names = getattr(self.tokenizer, "lang_code_to_token", {})
        token = cast(int, self.tokenizer.convert_tokens_to_ids(names.get(language, language)))
        is_first = cast(Any, self.tokenizer)(text_target="")["input_ids"][0] == token
        return {"forced_bos_token_id" if is_first else "decoder_start_token_id": token}


def _languages(tokenizer: Any) -> list[str]:
    """What the languages of a tokenizer are called."""
    named = getattr(tokenizer, "lang_code_to_token", None)  # M2M100: "en" is the token __en__
    if named:
        return sorted(named)
    others = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    return sorted(set(tokenizer.all_special_tokens) - others)
