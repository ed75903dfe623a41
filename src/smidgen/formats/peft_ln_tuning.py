"""LayerNorm tuning in Hugging Face PEFT's folder: <path of the norm>.ln_tuning_layers.weight and .bias, whole."""

from collections.abc import Sequence

from ..core.method import Method
from ..core.site import Site
from .layout import PREFIX, Modules, clean
from .peft_declared import DeclaredTranslation
from .translation import Shapes

_WITHIN = ".ln_tuning_layers."


class LNTuningTranslation(DeclaredTranslation):
    """Weights and biases of norms."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        for site in sites:
            own = {name for name, parameter in site.layer._parameters.items() if parameter is not None}
            if not site.path or own != {s.parameter for s in sites if s.path == site.path}:
                return f"{site.name}: HF PEFT trains a norm whole, not one of its parameters"
            if site.layer._buffers:
                return f"{site.path}: HF PEFT would train its running statistics along"
        return None

    def key(self, site: Site, name: str) -> str:
        return f"{PREFIX}{clean(site.path)}{_WITHIN}{site.parameter}"

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        named = [key.removeprefix(PREFIX).rpartition(_WITHIN) for key in shapes if _WITHIN in key]
        return [
            modules.site(path, leaf)
            for path, _, leaf in named
            if path in modules and modules[path]._parameters.get(leaf) is not None
        ]
