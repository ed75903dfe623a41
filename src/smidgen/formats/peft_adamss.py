"""AdaMSS in Hugging Face PEFT's folder: V, A and B of each cluster; which outputs a cluster has is computed again."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.adamss import AdaMSS
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes

V = ".adamss_newB"


class AdaMSSTranslation(DeclaredTranslation):
    """The subspaces of linear layers."""

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        stored = []
        for site in sites:
            path, places = PREFIX + clean(site.path), partial(_places, cast(AdaMSS, method), site)
            both = ((site.name, "V"), (site.name, "places"))
            stored.append(Stored(path + V, both, partial(_pack, places=places), partial(_unpack, places=places)))
            for name in tensors[site.name]:
                letter, _, k = name.partition(".")
                if k:
                    stored.append(Stored(f"{path}.adamss_{letter}.{k}", ((site.name, name),)))
        return stored

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        paths = [key.removeprefix(PREFIX).removesuffix(V) for key in shapes if key.endswith(V)]
        return [modules.site(path) for path in paths if path in modules]

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        sizes = {}
        for site in found.sites:
            begin = f"{PREFIX}{clean(site.path)}.adamss_B."
            blocks = [shapes[key] for key in (f"{begin}{k}" for k in range(len(shapes))) if key in shapes]
            if not blocks or any(len(shape) != 2 for shape in blocks):
                raise FolderError(
                    f"{site.name} has no subspaces in the file: adamss_B.0, adamss_B.1, ... are not there"
                )
            sizes[site.name] = tuple(blocks)
        return Found({**found.settings, "sizes_pattern": sizes}, found.sites)


def _places(method: AdaMSS, site: Site) -> Tensor:
    """Where each output stands among the clusters' rows, computed from the model.  Raises FolderError."""
    found, known = method.decomposed(site), method.sizes_pattern.get(clean(site.name), ())
    if [O for O, _ in found.sizes] != [O for O, _ in known]:
        raise FolderError(
            f"{site.name}: here its clusters have {[O for O, _ in found.sizes]} outputs, in the adapter "
            f"{[O for O, _ in known]}. HF PEFT's files do not say which: they are computed from the weights, so "
            "these, the kind of device and scikit-learn have to be the same"
        )
    return found.places


def _pack(tensors: Sequence[Tensor], places: Any) -> Tensor:
    V, own = tensors
    if not own.is_meta and not torch.equal(own.cpu(), places()):
        raise FolderError("HF PEFT would compute other clusters than this adapter has, so nothing was written")
    return V


def _unpack(V: Tensor, places: Any) -> tuple[Tensor, Tensor]:
    return V, places()
