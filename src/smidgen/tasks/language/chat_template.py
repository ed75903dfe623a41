"""Turns as the text that a model was made for, by the template of its tokenizer, and which tokens of it are answers.

    whole = template(turns)                                     <user>Hi<end> <assistant>Hello<end>
    answer i = whole[len(before) : len(after)]                                           ------------
        before = template(turns before i, with the start of an answer)
        after  = template(turns up to i)

So the mask is exact whatever the template is, and needs no marks in it.  It asks that what was rendered stays as it is
when turns follow; a template that rewrites earlier turns (some drop old reasoning) is refused.

Where a tokenizer has no template, turns are written plainly, each answer closed with the token that ends a text:

    ### User:
    Hi

    ### Assistant:
    Hello</s>
"""

from collections.abc import Sequence
from typing import Any, cast

from ...core.errors import DataError, ModelError
from ...data.conversations import Turn
from ..loading import Tokenizer, first_line
from .token_rows import IGNORED, Tokens

_PLAIN = (
    "{% for m in messages %}{{ '### ' + (m.role | capitalize) + ':\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


def ensure_template(tokenizer: Tokenizer) -> tuple[str, str]:
    """Give a tokenizer that has no template the plain one.  Returns which it has now, and why."""
    if tokenizer.chat_template:
        return "the model's own", "its tokenizer has one"
    begins = cast(Any, tokenizer)("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + _PLAIN
    return "plain", 'its tokenizer has none: "### User:", "### Assistant:" and the end token'


def rendered(tokenizer: Tokenizer, turns: Sequence[Turn], *, asks: bool) -> str:
    """The turns as text.   asks: with the start of an answer.  Raises DataError where the template refuses them."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # of a template that came with the model: it may raise anything
        raise DataError(f"the model's chat template does not take it: {first_line(error)}") from None
    return cast(str, text)


def answers_in(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
    """The turns as text, and from where to where in it, in characters, the answers are, each with what ends it.

    Raises DataError where the template refuses the turns, or rewrites those before an answer.
    """
    whole = rendered(tokenizer, turns, asks=False)
    spans = []
    for i, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        before = rendered(tokenizer, turns[:i], asks=True)
        after = rendered(tokenizer, turns[: i + 1], asks=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise DataError(
                f"the model's chat template renders what is before message {i + 1} differently once it is there, so "
                "which tokens are the answer cannot be told. Learn from all tokens (--set task.loss_on=all), or give "
                "each row one answer"
            )
        spans.append((len(before), len(after) - _behind_the_end(tokenizer, after)))
    return whole, spans


def encoded(tokenizer: Tokenizer, texts: Sequence[str], spans: Sequence[Any]) -> list[Tokens]:
    """Tokens of rendered texts.   spans: of the answers in each, or None where all but the first token is learned.

    A token that holds any character of an answer is a part of it.   Raises ModelError.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} cannot tell where its tokens stand in the text: a fast one can")
    # the template has written the special tokens
    found: Any = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = []
    for ids, offsets, answers in zip(found["input_ids"], found["offset_mapping"], spans, strict=True):
        if answers is None:
            rows.append((ids, [IGNORED, *ids[1:]]))
            continue
        targets = [IGNORED] * len(ids)
        for start, end in answers:
            for t, (first, last) in enumerate(offsets):
                if first < end and max(last, first + 1) > start:
                    targets[t] = ids[t]
        rows.append((ids, [IGNORED, *targets[1:]]))
    return rows


def _behind_the_end(tokenizer: Tokenizer, text: str) -> int:
    """How many characters of white space follow the special token that ends the text; 0 if none ends it.

    Nobody reads what a model would say behind its end.
    """
    bare = text.rstrip()
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return len(text) - len(bare) if bare.endswith(special) else 0
