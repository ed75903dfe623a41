"""What Hugging Face PEFT's prompt methods share on disk: one tensor, `prompt_embeddings`, that names no place."""

from collections.abc import Mapping
from typing import Any, cast

from ..core.errors import FolderError
from .translation import number, refuse_unknown

KEY = "prompt_embeddings"


def length_of(config: Mapping[str, Any], used: frozenset[str]) -> int:
    """How many virtual tokens a config says.  Raises FolderError on what cannot be followed."""
    refuse_unknown(config, used)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise FolderError("num_transformer_submodules is not 1: of encoder-decoders HF PEFT's layout is another")
    return cast(int, number(config, "num_virtual_tokens", whole=True))


def text_config(model: Any) -> Any:
    """The config of the text part of a model, or None."""
    config: Any = getattr(model, "config", None)
    return config.gettext_config() if hasattr(config, "gettext_config") else config
