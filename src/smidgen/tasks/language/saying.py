"""Letting a language model say something: the likeliest token each time, so that the same is said every time.

What does not fit in the model's positions is left out at the beginning: the end of a prompt is what is answered.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ...core.prompts import PromptMask, PromptTokens
from ...data.conversations import Turn
from ..loading import Tokenizer, positions_of
from .chat_template import rendered

GREEDY = {  # settings of generation, whatever the model's own are
    "do_sample": False,
    "num_beams": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
}


def question(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Tokens of turns, with the start of an answer.  Raises DataError where the chat template refuses them."""
    text = rendered(tokenizer, turns, asks=True)
    return cast("list[int]", cast(Any, tokenizer)(text, add_special_tokens=False)["input_ids"])


def opening(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that is to go on."""
    ids: list[int] = cast(Any, tokenizer)(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def room(body: nn.Module, count: int) -> tuple[int, int]:
    """How many tokens of a prompt a model takes where `count` are to follow, and how many of these then may.

    Virtual tokens in front take positions too.   At most half of the positions are for what follows.
    """
    virtual = sum(part.length for part in body.modules() if isinstance(part, PromptTokens | PromptMask))
    free = max(2, positions_of(body) - virtual)
    count = min(count, free // 2)
    return free - count, count


@torch.no_grad()
def say(body: nn.Module, tokenizer: Tokenizer, ids: Sequence[int], count: int, streamer: Any = None) -> str:
    """What follows these tokens, `count` tokens at most; of too many the last are read that leave `room` for these.

    body: of transformers, with or without adapters.   streamer: of transformers; it is told each token as it comes.
    """
    from transformers import GenerationConfig

    model: Any = body
    size, count = room(body, count)
    ids = ids[-size:]
    ends = model.generation_config.eos_token_id
    every = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how: Any = cast(Any, GenerationConfig)(
        **GREEDY,
        max_new_tokens=count,
        eos_token_id=sorted(every) or None,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    tokens = torch.tensor([list(ids)], device=next(body.parameters()).device)
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=how, streamer=streamer)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()
