"""Blocks whose training calls are compiled, by `torch.compile`, while a run lasts.

Blocks alike are compiled once, for batches of any shape, and what was compiled stays in PyTorch's cache for the next
run.  Numbers differ in their last bits from those of a run that is not compiled, and dropout draws others.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..core.blocks import blocks
from ..core.errors import RecipeError, reason


def refuse_compiling(model: nn.Module, device: torch.device) -> None:
    """Raise RecipeError where no blocks are known, or nothing can be compiled, such as without a C++ compiler."""
    if not blocks(model):
        name = type(model).__name__
        raise RecipeError(f"train.compile: true compiles blocks, and none are recognised in {name}. Leave it out")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        why = reason(error)
        raise RecipeError(f"train.compile: true: PyTorch cannot compile here: {why:.300}. Leave it out") from error


@contextmanager
def compiled(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """While the context lasts, the modules at these paths run compiled."""
    modules: list[Any] = [model.get_submodule(path) for path in paths]
    for module in modules:
        module.compile(dynamic=True, options={"fallback_random": True})
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def blocks_beside(model: nn.Module, others: Iterable[str]) -> list[str]:
    """Paths of the blocks that neither are, hold, nor lie in one of the modules at other paths."""
    beside = [f"{path}." for path in others]
    return [
        path
        for path in blocks(model)
        if not any(f"{path}.".startswith(other) or other.startswith(f"{path}.") for other in beside)
    ]


def as_written(is_compiled: bool) -> AbstractContextManager[Any]:
    """Run modules as they are written, compiled or not; for passes too few to pay for compiling anew."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
