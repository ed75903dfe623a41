"""Talking to a tuned language model from a pipe: history, the base beside it, commands, interruptions."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import smidgen
from smidgen.auto.plan import Plan
from smidgen.core.errors import RecipeError
from smidgen.data.conversations import Turn
from smidgen.data.table import Table
from smidgen.recipes import chat
from smidgen.recipes.save import Tuned
from smidgen.tasks.base import Asked
from smidgen.tasks.causal_lm import CausalLM, CausalLMSettings
from smidgen.tasks.language.saying import question, say
from smidgen.tasks.models import locate

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_lm import tiny_lm

ROWS = Table({"messages": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]]}, ["rows:1"])


@pytest.fixture
def tuned(tmp_path, monkeypatch) -> Tuned:
    """A tiny model whose adapter has moved far enough to say something else; answers are 8 tokens."""
    monkeypatch.setattr(chat, "_SAID", 8)
    monkeypatch.setattr(chat, "best_device", lambda: torch.device("cpu"))
    located = locate(str(tiny_lm(tmp_path)))
    asked = Asked(model=located, plan=Plan(), device=torch.device("cpu"), seed=0)
    task = CausalLM.understand({"train": ROWS}, CausalLMSettings(), asked)
    model = task.build(asked)
    adapters = smidgen.attach(model.body, smidgen.LoRA(rank=4, targets=["*.q_proj", "*.down_proj"]), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
    return Tuned(model=model.eval(), task=task, settings=task.settings, adapters=adapters, located=located)


def talk(tuned, lines, base=False) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    chat.talk(tuned, base=base, console=console, lines=iter(lines))
    return console.file.getvalue()


def expected(tuned, *turns) -> str:
    return say(tuned.model.body, tuned.task.tokenizer, question(tuned.task.tokenizer, turns), 8)


def test_answers_go_on_from_what_was_said_until_it_is_forgotten(tuned):
    first = expected(tuned, Turn("user", "Hi"))
    second = expected(tuned, Turn("user", "Hi"), Turn("assistant", first), Turn("user", "And?"))
    alone = expected(tuned, Turn("user", "And?"))
    assert second != alone
    said = talk(tuned, ["Hi\n", "\n", "And?\n", "/reset\n", "And?\n", "/quit\n", "Hi\n"])
    places = [said.index(part) for part in (first, second, "forgotten", alone)]
    assert places == sorted(places)
    assert said.count(first) == 1  # nothing after /quit


def test_base_and_tuned_answer_each_on_its_own_history_and_the_adapter_stays_on(tuned):
    by_tuned = expected(tuned, Turn("user", "Hi"))
    tuned.adapters.activate(None)
    by_base = expected(tuned, Turn("user", "Hi"))
    again = expected(tuned, Turn("user", "Hi"), Turn("assistant", by_base), Turn("user", "And?"))
    tuned.adapters.activate("default")
    assert by_base != by_tuned
    said = talk(tuned, ["Hi", "And?"], base=True)
    assert [said.count(word) for word in ("base  ", "tuned ")] == [2, 2]
    assert all(answer in said for answer in (by_base, by_tuned, again))
    assert tuned.adapters.active == "default"


def test_an_interrupted_answer_is_forgotten_and_the_next_line_is_asked_for(tuned, monkeypatch):
    answer = chat.Speaker.answer

    def interrupted(self, said, write):
        if said == "stop":
            raise KeyboardInterrupt
        return answer(self, said, write)

    monkeypatch.setattr(chat.Speaker, "answer", interrupted)
    alone = expected(tuned, Turn("user", "And?"))
    said = talk(tuned, ["stop", "And?"])
    assert "stopped" in said
    assert alone in said

    class Lines:
        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt
            return "And?" if self.asked == 2 else "/quit"

    assert alone in talk(tuned, Lines())


def test_an_unknown_command_shows_what_there_is(tuned):
    assert talk(tuned, ["/help"]).count(chat.HELP) == 2  # once at the start


def test_the_oldest_turns_go_where_there_is_no_room(tuned):
    speaker = chat.Speaker(tuned.task, tuned.model.body, tuned.adapters, "tuned", "default")
    for i in range(30):
        speaker.remember(f"question {i}", f"answer {i}")
    speaker.answer("And?", lambda text: None)
    assert 0 < len(speaker.history) < 60
    assert speaker.history[-1] == Turn("assistant", "answer 29")
    assert speaker.history[0].role == "user"


def test_what_does_not_talk_is_refused(tuned):
    with pytest.raises(RecipeError, match="leave --base out"):
        talk(replace(tuned, adapters=None), [], base=True)

    class Other:
        name = "tagging"

    with pytest.raises(RecipeError, match="a result of tagging does not talk"):
        talk(replace(tuned, task=Other()), [])
