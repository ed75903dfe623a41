"""Lily in Hugging Face PEFT's folder: what layers share is written under each of them.

    A of `stride` sites in a row (R, I)     lily_A.weight (R, I)         the same under each of them
    B of a kind (E R, O)                    lily_B.weight (E R, O)       the same under each layer of the kind
    G (E, R)                                lily_router.weight (E, R)

HF PEFT takes the layers whose paths end with the same one of its `target_modules` for a kind, and all that a pattern
names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.lily import Halves, Lily
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .ordered import OrderedTranslation
from .translation import Found, Shapes, target_modules


class LilyTranslation(OrderedTranslation):
    """Lily on linear layers."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        lily = cast(Lily, method)
        kinds = _kinds(_names(modules, lily, sites), sites)
        if kinds is None or _which(replace(lily, kinds=kinds), sites) != _which(lily, sites):
            return "HF PEFT's target_modules would make other layers share, so that it would load something else"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        names = _names(modules, cast(Lily, method), sites)
        return {**super().fields(modules, method, sites), "target_modules": names}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        which, first = _which(cast(Lily, method), sites), sites[0].name
        found = []
        for site in sites:
            a, b = which[site.name]
            path = PREFIX + clean(site.path)
            found += [
                Stored(f"{path}.lily_A.weight", ((first, f"shared.A.{a}"),)),
                Stored(f"{path}.lily_B.weight", ((first, f"shared.B.{b}"),)),
                Stored(self.key(site, "router"), ((site.name, "router"),)),
            ]
        return found

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        names = config.get("target_modules")
        kinds = _kinds(names, found.sites)
        if kinds is None:
            raise FolderError(
                f"target_modules is {str(names)[:80]!r}, by which layers share: it is no list of names, or several of "
                "them are the end of one layer's path, and HF PEFT takes any"
            )
        last_names = all("." not in kind for kind in kinds) and kinds != ("",)
        return Found({**found.settings, "kinds": () if last_names else kinds}, found.sites)


def _which(method: Lily, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    return Halves(method, sites).which


def _names(modules: Modules, method: Lily, sites: Sequence[Site]) -> list[str] | str:
    """The target_modules to write: the kinds themselves, if they name these sites and no others."""
    paths = {clean(site.path) for site in sites}
    named = modules.ending(method.kinds) == paths if method.kinds else False
    return sorted(method.kinds) if named else target_modules(modules, sorted(paths))


def _kinds(names: Any, sites: Sequence[Site]) -> tuple[str, ...] | None:
    """The kinds that HF PEFT makes of target_modules, or None if that is left to chance."""
    if isinstance(names, str):
        return ("",)  # one pattern, so what differs is the shape alone
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    alone = all(sum(clean(site.path).endswith(name) for name in names) == 1 for site in sites)
    return tuple(sorted(names)) if alone else None
