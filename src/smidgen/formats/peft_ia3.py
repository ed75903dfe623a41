"""IA3 in Hugging Face PEFT's folder: the same tensors; `feedforward_modules` have their input scaled."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..core.errors import FolderError
from ..core.layers import ConvKind, LinearKind
from ..core.method import Method
from ..core.site import Site
from ..methods.ia3 import IA3
from .layout import PREFIX, Modules, Stored, Tensors, clean, stored_tensors
from .translation import Found, PeftTranslation, Shapes, plain, refuse_unknown, transposed


class IA3Translation(PeftTranslation):
    """IA3 on linear layers and convolutions."""

    globs = ("feedforward",)

    def settings(self, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return {"feedforward": _scaling_input(cast(IA3, method), sites)}

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        inputs = _scaling_input(cast(IA3, method), sites)
        for site in sites:
            known = isinstance(site.kind, LinearKind) or isinstance(site.layer, nn.Conv2d | nn.Conv3d)
            if site.parameter or not known or not site.path:
                return f"{site.name or 'the model'}: HF PEFT has no IA3 for {type(site.layer).__name__}"
            name = clean(site.name)
            if name not in inputs and name.endswith(tuple(inputs)):  # their rule, without a dot between
                return f"{name}: HF PEFT would take it for a feed-forward, because its name ends like one"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        paths = {clean(site.path) for site in sites}
        # their feedforward_modules must be among their target_modules, so both are whole paths
        exact = modules.ending(paths) == paths
        return {
            "target_modules": sorted(paths) if exact else "|".join(sorted(path.replace(".", "\\.") for path in paths)),
            "feedforward_modules": _scaling_input(cast(IA3, method), sites),
            "fan_in_fan_out": transposed(sites),
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return stored_tensors(method.disk, sites, tensors)

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        refuse_unknown(config, frozenset({"feedforward_modules"}))
        keys = [key.removeprefix(PREFIX).removesuffix(".ia3_l") for key in shapes if key.endswith(".ia3_l")]
        sites = [modules.site(path) for path in keys if path in modules]
        inputs = [site.name for site in sites if _scales_input(site, config, shapes)]
        return Found({"feedforward": tuple(inputs)}, tuple(sites))


def _scaling_input(method: IA3, sites: Sequence[Site]) -> list[str]:
    return sorted(clean(site.name) for site in sites if method.scales_input(site))


def _scales_input(site: Site, config: Mapping[str, Any], shapes: Shapes) -> bool:
    """By the shape: (1, I) of the input, (O, 1) of the output; else by name, as HF PEFT does."""
    shape = shapes[f"{PREFIX}{clean(site.path)}.ia3_l"]
    if len(shape) == 2 and shape[0] != shape[1] and not isinstance(site.kind, ConvKind):
        return shape[0] == 1 and shape[1] != 1
    ends = config.get("feedforward_modules") or []
    if not isinstance(ends, list):
        raise FolderError(
            f"feedforward_modules is {str(ends)[:80]!r}. Patterns from a file are not run: write the paths it means"
        )
    return clean(site.path).endswith(tuple(plain(end, "feedforward_modules") for end in ends))
