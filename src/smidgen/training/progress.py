"""What a person sees while a model trains: a bar with loss, metric, speed and time left; lines
where output is piped.
"""

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY_S = 15.0  # where there is no terminal to draw a bar on


class Progress(AbstractContextManager["Progress"]):
    """A bar on a terminal, a line now and then elsewhere.   console: None shows nothing (helper processes)."""

    def __init__(
        self, console: "Console | None", title: str, steps: int, done: int = 0, *, unit: str = "tokens"
    ) -> None:
        self.console, self.title, self.steps, self.first, self.unit = console, title, steps, done, unit
        self.metric = ""
        self._loss: float | None = None
        self._tokens = 0
        self._start = self._shown = time.monotonic()
        self._bar = None
        if console is not None and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("[bold]{task.description}", "{task.fields[state]}")
            self._bar = Bar(
                TextColumn(columns[0]),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(columns[1]),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done, state="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """One optimiser step is done: its loss, and how many tokens (or what `unit` says) it saw."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=self._state(now))
        elif self.console is not None and (now - self._shown >= _LINE_EVERY_S or step == self.steps):
            self._shown = now
            left = (now - self._start) / max(step - self.first, 1) * (self.steps - step)
            self.console.print(
                f"{self.title} {step}/{self.steps}  {self._state(now)}  left {left:.0f} s", highlight=False
            )

    def _state(self, now: float) -> str:
        speed = self._tokens / max(now - self._start, 1e-9)
        return "  ".join(
            part for part in (f"loss {self._loss:.3f}", self.metric, f"{speed:,.0f} {self.unit}/s") if part
        )
