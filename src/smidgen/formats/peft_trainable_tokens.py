"""Trainable tokens in Hugging Face PEFT's folder: the rows of each layer under its path, of tied layers each time."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.trainable_tokens import with_tied
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes

SUFFIX = ".trainable_tokens_delta"


class TrainableTokensTranslation(DeclaredTranslation):
    """The rows of tokens, of embeddings and of heads without bias."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        biased = [site.name for site in sites if site.bias is not None]
        if biased:
            return f"{biased[0]}: HF PEFT leaves the bias of a linear layer out"
        tied = [site.name for site in sites if site not in _first(sites)]
        if tied and not getattr(getattr(modules.model, "config", None), "tie_word_embeddings", False):
            return f"{tied[0]}: HF PEFT leaves it as it is, because the model's config does not say that it is tied"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return super().fields(modules, method, _first(sites))

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        weights = [id(site.stored) for site in _first(sites)]
        return [
            Stored(
                f"{PREFIX}{clean(site.path)}{SUFFIX}",
                ((sites[0].name, f"shared.rows.{weights.index(id(site.stored))}"),),
            )
            for site in sites
        ]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        tokens = found.settings["tokens"]
        if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise FolderError(f"token_indices is {str(tokens)[:80]!r}, not a list of whole numbers")
        return Found({"tokens": tuple(tokens)}, with_tied(modules.model, found.sites))

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        paths = [key.removeprefix(PREFIX).removesuffix(SUFFIX) for key in shapes if key.endswith(SUFFIX)]
        return [modules.site(path) for path in paths if path in modules]


def _first(sites: Sequence[Site]) -> list[Site]:
    """Of each weight the first site."""
    first: dict[int, Site] = {}
    for site in sites:
        first.setdefault(id(site.stored), site)
    return list(first.values())
