"""ShadowPEFT in Hugging Face PEFT's folder: modules under the name that the adapter had there, which is "default".

    base_model.model.<block>.shadow_down.default.weight      of T and G: shadow_update_transform.default.0.weight
    base_model.shadow_backbone.default.<tensor>              and shadow_projection.default.weight

Their last block has a T and a G too, which nothing reads: zeros are written, and what is there is left aside.
Their files of classifiers hold a second head for the shadow's own loss; they are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.method import Method
from ..core.site import Site
from ..methods.shadow import Shadow
from .layout import PREFIX, Modules, Stored, Tensors, clean, zeros
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes, target_modules

DOWN = ".shadow_down.default.weight"
_PARTS = {"in": "0.weight", "in_bias": "0.bias", "out": "2.weight", "out_bias": "2.bias"}
UPDATE = {
    f"{letter}_{ours}": f"shadow_update_{name}.default.{theirs}"
    for letter, name in (("T", "transform"), ("G", "gate"))
    for ours, theirs in _PARTS.items()
}


class ShadowTranslation(DeclaredTranslation):
    """The shadow of a causal language model."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if hasattr(modules.model, "score") or hasattr(modules.model, "classifier"):
            return "HF PEFT gives the shadow of a classifier a head of its own"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        found = super().fields(modules, method, sites)
        return {**found, "target_modules": target_modules(modules, [clean(site.path) for site in _blocks(sites)])}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        top, followed, stored = sites[0].name, _blocks(sites), []
        for number, site in enumerate(followed):
            path = PREFIX + clean(site.path)
            stored += [
                Stored(path + DOWN, ((site.name, "D"),)),
                Stored(f"{path}.shadow_up.default.weight", ((site.name, "U"),)),
            ]
            W, u = tensors[site.name]["U"].shape[0], cast(Shadow, method).update_width or cast(Shadow, method).rank
            shapes = {"in": (u, W), "in_bias": (u,), "out": (W, u), "out_bias": (W,)}
            for ours, theirs in UPDATE.items():
                if number < len(followed) - 1:
                    stored.append(Stored(f"{path}.{theirs}", ((top, f"shared.updates.{number}.{ours}"),)))
                else:
                    stored.append(zeros(f"{path}.{theirs}", shapes[ours[2:]]))
        for name in tensors[top]:
            backbone = name.removeprefix("shared.backbone.")
            if backbone != name:
                stored.append(Stored(f"base_model.shadow_backbone.default.{backbone}", ((top, name),)))
            elif name == "shared.P":
                stored.append(Stored("base_model.shadow_projection.default.weight", ((top, name),)))
        return stored

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        paths = {site.path for site in found.sites}
        if not paths:
            return found
        followed = Shadow(**found.settings).resolve(modules.model).sites  # with the places that have no tensors
        return Found(found.settings, tuple(s for s in followed if s.path in paths or s not in _blocks(followed)))

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        paths = [key.removeprefix(PREFIX).removesuffix(DOWN) for key in shapes if key.endswith(DOWN)]
        return [modules.site(path) for path in paths if path in modules]


def _blocks(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if not hasattr(site.layer, "get_input_embeddings")]
