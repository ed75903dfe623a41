"""PEANuT in Hugging Face PEFT's folder: lists of encoders and decoders, and transformers' names of non-linearities."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import Modules
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes

# transformers' names -> ours; the first of several is written
NAMES = {
    **{name: name for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "mish")},
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
    "linear": "none",
}


class PEANuTTranslation(DeclaredTranslation):
    """The networks of linear layers."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        found = super().fields(modules, method, sites)
        return {**found, "act_fn": next(name for name, ours in NAMES.items() if ours == found["act_fn"])}

    def key(self, site: Site, name: str) -> str:
        in_list = name.startswith(("encoders.", "decoders."))
        return super().key(site, f"peanut_{name}.weight" if in_list else name)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        name = found.settings["non_linearity"]
        if name not in NAMES:
            raise FolderError(f"act_fn is {str(name)[:80]!r}; of transformers' these are known: {', '.join(NAMES)}")
        return Found({**found.settings, "non_linearity": NAMES[name]}, found.sites)
