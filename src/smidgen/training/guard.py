"""Stop a run at the step where a number stops being finite, or where someone asks it to stop.

The loss alone does not tell: attention on a CPU turns NaN queries into finite outputs, and one inf in a weight gives a
loss of 0.0. So each step looks at the norm of all gradients, which clipping needs anyway: one pass over the adapter's
tensors, and a sum that is finite only if all its terms are. Only if it is not are the tensors looked at one by one.
"""

import math
import signal
import threading
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, Never, Self

import torch
from torch import Tensor, nn

from ..core.errors import NonFiniteError

_NAMED = 20  # tensors in one message: once NaN has spread it is everywhere, and the first ones say where


class Guard:
    """Watches the numbers of a run.

    named_parameters: those of the whole model. The trained ones are watched; the frozen ones are looked at when
    something went wrong, to say whether it came from them.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = list(named_parameters)
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
        self.step = 0  # of the last loss seen, for messages

    def check_loss(self, loss: Tensor | float, step: int) -> None:
        """Raise NonFiniteError if the loss is not finite. Waits for the device if `loss` is a tensor there."""
        self.step = step
        value = loss.item() if isinstance(loss, Tensor) else loss
        if not math.isfinite(value):
            self._fail(f"the loss is {value}", self.trained)

    def clip_and_check(self, max_norm: float) -> float:
        """Scale the gradients down to a total 2-norm of at most `max_norm`; returns the norm before.

        Call it after backward and before the optimiser steps. `math.inf` checks without clipping. Same arithmetic as
        `torch.nn.utils.clip_grad_norm_`. Raises NonFiniteError, naming the tensors; the parameters are still good then.
        """
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        total = _norm(gradients.values())
        norm = total.item()
        if not math.isfinite(norm):
            self._fail("gradients are not finite", gradients)
        if norm > max_norm:
            nn.utils.clip_grads_with_norm_(self.trained.values(), max_norm, total)
        return norm

    def check_parameters(self, step: int) -> None:
        """Raise NonFiniteError if a trained tensor is not finite. Call it before anything is written."""
        if not math.isfinite(_norm(self.trained.values()).item()):
            self.step = step
            self._fail("trained tensors are not finite, so nothing was saved", self.trained)

    def _fail(self, what: str, tensors: Mapping[str, Tensor]) -> Never:
        text = f"step {self.step}: {what}"
        if bad := _bad(tensors):
            text += f": {len(bad)} of {len(tensors)} tensors: {_list(bad)}"
        if sources := _bad(self.frozen):
            text += f". Frozen weights are not finite either: {_list(sources)}. Load the base model in a wider dtype"
        else:
            text += ". Start anew with a lower learning rate, or train in float32"
        raise NonFiniteError(text)


@torch.no_grad()
def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all of them together: not finite if and only if one entry is not."""
    tensors = list(tensors)
    norm = nn.utils.get_total_norm(tensors)
    if not math.isfinite(norm.item()):  # large but finite entries overflow when squared
        norm = nn.utils.get_total_norm([tensor.double() for tensor in tensors])
    return norm


@torch.no_grad()
def _bad(tensors: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name, tensor in tensors.items():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a shard, what this process has
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or inf:
            found.append(f"{name} ({nan} nan, {inf} inf of {tensor.numel()})")
    return found


def _list(items: list[str]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more


class Stopper:
    """While open, SIGINT and SIGTERM set `requested` instead of ending the process; the loop reads it after each step.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python allows no signal handlers,
    nothing is caught.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None  # which signal asked
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
