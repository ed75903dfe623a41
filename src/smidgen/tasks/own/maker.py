"""What a function of the user's file makes: `Pieces`, checked, and their model."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.errors import ModelError, RecipeError
from ..base import Batch, TaskModel
from ..pieces import Pieces, call, told, wrong_with, wrong_with_model


@dataclass(frozen=True)
class Maker:
    """A function that returns `Pieces`.   said: FILE.py:NAME."""

    said: str
    function: Callable[[], Any]

    @functools.cached_property
    def path(self) -> str:
        """The user's file."""
        return inspect.getfile(inspect.unwrap(self.function))

    @functools.cached_property
    def pieces(self) -> Pieces:
        """What the function returns, checked as far as that goes without calling it.  Raises RecipeError."""
        try:
            pieces = self.function()
        except Exception as error:
            raise RecipeError(f"{self.said}: {told(error, self.path)}") from error
        if not isinstance(pieces, Pieces):
            kind = f"{Pieces.__module__}.Pieces"
            raise RecipeError(f"{self.said} returns a {type(pieces).__name__}; it is to return {kind}")
        self._refuse(wrong_with(pieces))
        return pieces

    def model(self, seed: int) -> nn.Module:
        """The module of the pieces, untouched each time.  Raises ModelError."""
        given = self.pieces.model
        if isinstance(given, nn.Module):
            return copy.deepcopy(given)
        torch.manual_seed(seed)
        try:
            model = given()
        except Exception as error:
            raise ModelError(f"{self.said}: model: {told(error, self.path)}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.said}: model gives a {type(model).__name__}; it is to give a torch.nn.Module")
        return model

    def tried(self, seed: int) -> nn.Module:
        """The module, once it has taken rows and its loss was made of them.  Raises RecipeError or ModelError."""
        model = self.model(seed)
        self._refuse(wrong_with_model(self.pieces, model, self.path))
        return model

    def _refuse(self, wrong: Sequence[str]) -> None:
        if wrong:
            raise RecipeError(f"{self.said} cannot be run:\n" + "\n".join(f"  {line}" for line in wrong))


class CustomModel(TaskModel):
    """The user's module as it is; its head is a part of it."""

    def __init__(self, body: nn.Module, head: str | None) -> None:
        super().__init__()
        self.body, self.head = body, nn.Identity()
        self.heads = (head,) if head else ()

    def forward(self, batch: Batch) -> Any:
        return call(self.body, batch)
