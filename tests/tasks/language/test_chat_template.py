"""Which tokens of a rendered conversation are answers: exact for any template that keeps what it has rendered."""

import sys
from pathlib import Path

import pytest

from smidgen.core.errors import DataError
from smidgen.data.conversations import Turn
from smidgen.tasks.language.chat_template import answers_in, encoded, ensure_template, rendered
from smidgen.tasks.language.token_rows import IGNORED

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny_lm import CHAT, tokenizer_of

TALK = [
    Turn("system", "Be kind"),
    Turn("user", "Hi"),
    Turn("assistant", "Hello ü 🙂"),
    Turn("user", "And?"),
    Turn("assistant", "Bye"),
]


def learned(tokenizer, turns):
    """The learned tokens as text, and the others."""
    whole, spans = answers_in(tokenizer, turns)
    [(ids, targets)] = encoded(tokenizer, [whole], [spans])
    assert all(target in (IGNORED, token) for token, target in zip(ids, targets, strict=True))
    assert ids == tokenizer.apply_chat_template([vars(turn) for turn in turns])["input_ids"]
    return (
        tokenizer.decode([t for t in targets if t != IGNORED]),
        tokenizer.decode([i for i, t in zip(ids, targets, strict=True) if t == IGNORED]),
    )


def test_only_the_answers_and_their_end_are_learned():
    answers, rest = learned(tokenizer_of(), TALK)
    assert answers == "Hello ü 🙂<|im_end|>Bye<|im_end|>"
    assert "Hello" not in rest
    assert rest.endswith("<|im_start|>assistant\n\n")  # and what follows the end is not


def test_a_template_without_marks_gives_what_generation_marks_give():
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of(marked)
    expected = tokenizer.apply_chat_template(
        [vars(turn) for turn in TALK], return_dict=True, return_assistant_tokens_mask=True
    )
    plain = tokenizer_of(CHAT)
    whole, spans = answers_in(plain, TALK)
    [(ids, targets)] = encoded(plain, [whole], [spans])
    assert ids == expected["input_ids"]
    assert [int(t != IGNORED) for t in targets] == list(expected["assistant_masks"])


def test_where_all_is_learned_only_the_first_token_is_not():
    tokenizer = tokenizer_of()
    [(ids, targets)] = encoded(tokenizer, [rendered(tokenizer, TALK, asks=False)], [None])
    assert targets == [IGNORED, *ids[1:]]


def test_a_tokenizer_without_a_template_gets_the_plain_one_with_the_end_token():
    tokenizer = tokenizer_of(None)
    assert ensure_template(tokenizer)[0] == "plain"
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello")]
    assert rendered(tokenizer, turns, asks=False) == "### User:\nHi\n\n### Assistant:\nHello<|end|>\n\n"
    assert rendered(tokenizer, turns[:1], asks=True) == "### User:\nHi\n\n### Assistant:\n"
    assert learned(tokenizer, turns)[0] == "Hello<|end|>"
    assert ensure_template(tokenizer_of())[0] == "the model's own"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_to_do():
    forgetful = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ '<' + m.role + '>' + m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = tokenizer_of(forgetful)
    with pytest.raises(DataError, match=r"before message 3 differently.*task\.loss_on=all"):
        answers_in(tokenizer, TALK)
    assert answers_in(tokenizer, TALK[1:3]) == ("<user>Hi<assistant>Hello ü 🙂", [(19, 28)])


def test_what_a_template_itself_refuses_is_said_in_its_words():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"template does not take it: .*roles must alternate"):
        answers_in(tokenizer_of(strict), TALK)
