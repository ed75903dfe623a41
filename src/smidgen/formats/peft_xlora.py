"""X-LoRA in Hugging Face PEFT's folder: the classifier at the root, each expert a LoRA folder of its own, by a path.

So the experts are loaded first, under the names that `adapters` has in adapter_config.json, and the folder is read but
not written: their loader wants paths of this machine in the file.  What PEFT 0.21.2 itself writes lacks every tensor
with an expert's number in its key, `layers.0` of the classifier for one: such folders are refused for what is missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.errors import ConfigError, FolderError
from ..core.experts import body_of, sites_of
from ..core.method import Method
from ..core.site import Site
from ..methods.xlora import XLoRA, fitted_to
from .layout import Modules, Stored, Tensors
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes

KEY = "base_model.internal_xlora_classifier.layers."


class XLoRATranslation(DeclaredTranslation):
    """The classifier; what the experts are is copied from those in the model."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return "HF PEFT keeps each expert of X-LoRA in a folder of its own and finds it by a path"

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        between = 3 if cast(XLoRA, method).dropout else 2  # a linear layer, its ReLU, its dropout
        return [
            Stored(f"{KEY}{between * i}.{name}", ((sites[0].name, f"shared.{name}.{i}"),))
            for i in range(cast(XLoRA, method).depth)
            for name in ("weight", "bias")
        ]

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        return []  # the file names none

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        settings = super().find(modules, config, shapes).settings
        names = config.get("adapters")
        names = tuple(names) if isinstance(names, dict) else ()
        missing = [name for name in names if not sites_of(modules.model, (name,))]
        if not names or missing:
            raise FolderError(
                f"mixes the LoRA adapters {', '.join(map(str, names))[:200]}, which are folders of their own. Load "
                f"them first, under these names: load(model, folder, {(*missing, '0')[0]!r:.80}), then this one"
            )
        try:
            method = fitted_to(XLoRA(experts=names), modules.model)
        except ConfigError as error:
            raise FolderError(str(error)) from error
        sites = [modules.site(site.path) for site in sites_of(modules.model, names)]
        return Found({**settings, "experts": names, "rank": method.rank}, (body_of(modules.model), *sites))
