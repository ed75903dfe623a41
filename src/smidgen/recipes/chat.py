"""Talking to a tuned language model: `smidgen chat OUT`, with the base beside it if wanted.

    > My screen is black
    base   ...
    tuned  Try adjusting brightness or connecting an external monitor.

Lines come from anywhere, a person or a pipe.  /reset forgets what was said, /quit ends, Ctrl-C stops an answer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters import AdapterSet
from ..core.composition import Expression
from ..core.errors import DataError, RecipeError
from ..data.conversations import Turn
from ..tasks.causal_lm import CausalLM
from ..tasks.language.saying import opening, question, room, say
from .prepare import best_device
from .save import Tuned, load_result

if TYPE_CHECKING:
    from rich.console import Console

HELP = "/reset forgets what was said, /quit ends, Ctrl-C stops an answer"
_SAID = 256  # tokens of an answer, at most


def chat(adapter: Path, *, model: str | None, base: bool, console: "Console", lines: Iterator[str]) -> None:
    """Answer line after line until /quit or the end of the lines.

    model: where the base model is now, if not where it was.   base: let it answer too, before the tuned one.
    lines: what the user says; where it raises KeyboardInterrupt it is asked again.
    Raises FolderError or ModelError where the result cannot be loaded, RecipeError where it is none to talk to.
    """
    talk(load_result(adapter, model), base=base, console=console, lines=lines)


def talk(tuned: Tuned, *, base: bool, console: "Console", lines: Iterator[str]) -> None:
    """`chat` with a result that is loaded."""
    task, adapters = tuned.task, tuned.adapters
    if not isinstance(task, CausalLM):
        raise RecipeError(f"a result of {task.name} does not talk, one of causal_lm does; use smidgen predict")
    if base and adapters is None:
        raise RecipeError("the adapter is merged into the model, so the base is not there any more: leave --base out")
    body = tuned.model.to(best_device()).eval().body
    active = None if adapters is None else adapters.active
    names: dict[str, Expression] = {"base": None, "tuned": active} if base else {"tuned": active}
    speakers = [Speaker(task, body, adapters, name, expression) for name, expression in names.items()]
    console.print(HELP, style="dim", highlight=False)
    for line in _each(lines):
        said = line.strip()
        if said == "/quit":
            return
        if said == "/reset":
            for speaker in speakers:
                speaker.history.clear()
            console.print("forgotten", style="dim")
        elif said.startswith("/"):
            console.print(HELP, style="dim", highlight=False)
        elif said:
            _let_answer(speakers, said, console)


class Speaker:
    """The base or the tuned model, with the conversation as it went with it."""

    def __init__(
        self, task: CausalLM, body: nn.Module, adapters: AdapterSet | None, name: str, expression: Expression
    ) -> None:
        self.task, self.body, self.adapters, self.name, self.expression = task, body, adapters, name, expression
        self.history: list[Turn] = []

    def answer(self, said: str, write: Callable[[str], None]) -> str:
        """What it says; each word is written as soon as it is there.  Nothing is remembered."""
        if self.adapters is not None:
            self.adapters.activate(self.expression)
        streamer = _streamer(self.task.tokenizer, write)
        return say(self.body, self.task.tokenizer, self._tokens(said), _SAID, streamer)

    def remember(self, said: str, answer: str) -> None:
        """Go on from here."""
        self.history += [Turn("user", said), Turn("assistant", answer)]

    def _tokens(self, said: str) -> list[int]:
        """What the model reads: the conversation with the new line, or a text that is to go on."""
        if self.task.shape.kind == "text":
            return opening(self.task.tokenizer, said)
        limit, _ = room(self.body, _SAID)
        while True:
            ids = question(self.task.tokenizer, [*self.history, Turn("user", said)])
            if len(ids) <= limit or not self.history:
                return ids
            del self.history[:2]  # the oldest: there is no room for all


def _let_answer(speakers: list[Speaker], said: str, console: "Console") -> None:
    """All speakers answer one line; it counts for none of them if it is stopped."""
    write = partial(console.print, end="", soft_wrap=True, markup=False, highlight=False)
    answers = []
    try:
        for speaker in speakers:
            if len(speakers) > 1:
                console.print(f"{speaker.name:6}", end=" ", style="bold", highlight=False)
            answers.append(speaker.answer(said, write))
            console.print()
    except KeyboardInterrupt:
        console.print("\nstopped", style="dim")
        return
    except DataError as error:
        console.print(str(error), markup=False, highlight=False)
        return
    for speaker, answer in zip(speakers, answers, strict=True):
        speaker.remember(said, answer)


def _each(lines: Iterator[str]) -> Iterator[str]:
    """The lines; where the user interrupts, the next is asked for."""
    while True:
        try:
            line = next(lines, None)
        except KeyboardInterrupt:
            continue
        if line is None:
            return
        yield line


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
