"""BD-LoRA in Hugging Face PEFT's folder: the same tensors; which factor is block-diagonal goes by parts of paths there,
and is read from the tensors' shapes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from ..core.errors import FolderError
from ..core.layers import TransposedLinearKind
from ..core.method import Method
from ..core.site import Site
from ..methods.bdlora import BDLoRA
from .layout import PREFIX, Modules, clean
from .lora_variants import LoRAVariantTranslation
from .translation import Found, Shapes, as_number


class BDLoRATranslation(LoRAVariantTranslation):
    """BD-LoRA on linear layers."""

    field = "use_bdlora"
    known: ClassVar[Mapping[str, Any]] = {
        "target_modules_bd_a": None,
        "target_modules_bd_b": None,
        "nblocks": 1,
        "match_strict": True,
    }
    globs = ("diagonal_A", "diagonal_B")

    def settings(self, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        both = {f"diagonal_{which}": _diagonal(cast(BDLoRA, method), sites, which) for which in "AB"}
        return {**super().settings(method, sites), **both}

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if any(isinstance(site.kind, TransposedLinearKind) for site in sites):
            return "HF PEFT has no BD-LoRA for transposed layers such as GPT-2's Conv1D"
        in_A, in_B = (_diagonal(cast(BDLoRA, method), sites, which) for which in "AB")
        for one, other in ((in_A, in_B), (in_B, in_A)):
            for site in sites:
                name = clean(site.name)
                if name not in one and any(path in name for path in one):
                    what = "also" if name in other else "wrongly"
                    return f"{name}: HF PEFT would {what} take it for a layer whose name it contains"
        return super().obstacle(modules, method, sites)

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        method = cast(BDLoRA, method)
        in_A, in_B = (_diagonal(method, sites, which) for which in "AB")
        return {
            "target_modules_bd_a": in_A or None,
            "target_modules_bd_b": in_B or None,
            "nblocks": method.blocks,
            "match_strict": len(in_A) + len(in_B) == len(sites),
        }

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        wide: dict[str, list[str]] = {"A": [], "B": []}
        for site in found.sites:
            A, B = (shapes.get(f"{PREFIX}{clean(site.path)}.lora_{which}.weight", ()) for which in "AB")
            if len(A) != 2 or len(B) != 2:
                raise FolderError(f"{clean(site.path)}: A and B of BD-LoRA are matrices, here {A} and {B}")
            if A[1] != site.fan_in:
                wide["A"].append(clean(site.name))
            elif B[1] != A[0]:
                wide["B"].append(clean(site.name))
        both = {f"diagonal_{which}": tuple(names) for which, names in wide.items()}
        return Found({**found.settings, **both}, found.sites)

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        return {"blocks": as_number(value["nblocks"], f"{self.field}: nblocks", whole=True)}


def _diagonal(method: BDLoRA, sites: Sequence[Site], which: str) -> list[str]:
    return sorted(clean(site.name) for site in sites if method.diagonal_at(site) == which)
