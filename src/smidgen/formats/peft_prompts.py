"""What Hugging Face PEFT's prompt methods share on disk: one tensor, `prompt_embeddings`, that names no place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.func import functional_call

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import Stored, Tensors, stored_tensors
from .translation import number, refuse_unknown

KEY = "prompt_embeddings"


def length_of(config: Mapping[str, Any], used: frozenset[str], *, submodules: int = 1) -> int:
    """How many virtual tokens a config says.  Raises FolderError on what cannot be followed."""
    refuse_unknown(config, used)
    found = config.get("num_transformer_submodules")
    if found not in (None, submodules):
        raise FolderError(
            f"num_transformer_submodules is {str(found)[:20]}; for this method and model it can be {submodules} only"
        )
    return cast(int, number(config, "num_virtual_tokens", whole=True))


def text_config(model: Any) -> Any:
    """The config of the text part of a model, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def stored_with_result(
    key: str,
    method: Method,
    sites: Sequence[Site],
    tensors: Tensors,
    made: Callable[[Mapping[tuple[str, str], Tensor]], Tensor],
) -> list[Stored]:
    """The tensors of a reparametrised method as they are, and under `key` what they compute, which is all HF PEFT has.

    It leaves the others alone.   made: from {(site name, tensor name): tensor}.
    """
    own = stored_tensors(method.disk, sites, tensors)
    holds = tuple(hold for entry in own for hold in entry.holds)
    return [Stored(key, holds, lambda held: made(dict(zip(holds, held, strict=True))), derived=True), *own]


def result_of(method: Method, sites: Sequence[Site], names: Sequence[str]) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function that runs the method's `shared` with these tensors, called "shared.X", as its parameters."""

    def run(tensors: Sequence[Tensor]) -> Tensor:
        shared = method.shared(tuple(sites))
        assert shared is not None, f"{method.name} has nothing shared"
        values = dict(zip((name.removeprefix("shared.") for name in names), tensors, strict=True))
        return cast(Tensor, functional_call(shared, values, ()))

    return run
