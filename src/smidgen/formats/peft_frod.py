"""FRoD in Hugging Face PEFT's folder: the basis and the places of each role stand at the top, by its name."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..core.method import Method
from ..core.site import Site
from .layout import Modules, Stored, Tensors
from .peft_declared import DeclaredTranslation

NAMES = {"shared.V_": "frod_V", "shared.places_": "frod_s_indices"}


class FRoDTranslation(DeclaredTranslation):
    """Scales and rotations of linear layers, and what they share."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        shared = method.shared(tuple(sites))
        roles: Mapping[str, str] = getattr(shared, "role", {})
        mixed = next((s for s in sites if roles[s.name].endswith(f"_{s.fan_in}")), None)
        return f"{mixed.name}: its role has layers of several widths, which HF PEFT cannot decompose" if mixed else None

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        own = {site: {n: t for n, t in named.items() if "shared." not in n} for site, named in tensors.items()}
        stored = super().stored_peft(method, sites, own)
        for name, tensor in tensors[sites[0].name].items():
            for ours, theirs in NAMES.items():
                if name.startswith(ours):
                    role = name.removeprefix(ours)
                    stored.append(Stored(f"base_model.{theirs}.{role}", ((sites[0].name, name),)))
                    if theirs == "frod_V":
                        size = partial(_size, width=len(tensor))
                        stored.append(Stored(f"base_model.frod_s_size.{role}", (), size, _nothing))
        return stored


def _size(tensors: Sequence[Tensor], width: int) -> Tensor:
    return torch.tensor([width, width])


def _nothing(tensor: Tensor) -> tuple[Tensor, ...]:
    return ()
