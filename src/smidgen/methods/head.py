"""Head: train a module whole, as a copy that travels with the adapter; `modules_to_save` in Hugging Face PEFT's words.

    W' = any value          trainable parameters: all of the module's

By itself it is a linear probe: `attach(model, Head(targets="classifier"))`.  Beside another method it is said with
`heads`: `LoRA(heads=("classifier",))`.  The base model's own module stays as it was.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.attach import HELD
from ..core.disk_names import DiskNames
from ..core.method import Method, method
from ..core.site import Site, compute_dtype
from ..core.targets import head_modules


@method("head")
@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """A trained copy of whole modules, by default of the model's head."""

    summary = "W' = any value; the module is trained whole"
    paper = "linear probing: Alain & Bengio 2016, arXiv:1610.01644"
    disk = DiskNames("SMIDGEN_HEAD")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "a head is a module, not a single parameter"
        if not any(True for _ in site.layer.parameters(recurse=False)):
            return f"{type(site.layer).__name__} has no parameters of its own"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        return leaves(model, head_modules(model)), {}

    def build(self, site: Site) -> "HeadAdapter":
        return HeadAdapter(site)


def leaves(model: nn.Module, paths: list[str]) -> list[str]:
    """The modules at or below these paths that have parameters of their own."""
    found = []
    for path in paths:
        for sub, module in model.get_submodule(path).named_modules(prefix=path):
            if HELD not in sub.split(".") and any(True for _ in module.parameters(recurse=False)):
                found.append(sub)
    return found


class HeadAdapter(Adapter):
    """A copy of the layer in fp32 or better that is called in its place."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        memo = {id(held): None for held in site.layer.modules() if type(held).__name__ == "Held"}
        self.module: nn.Module = copy.deepcopy(site.layer, memo)  # type: ignore[arg-type]
        if HELD in self.module._modules:
            del self.module._modules[HELD]
            self.module.__class__ = type(self.module).base_class  # type: ignore[attr-defined]
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            master = torch.promote_types(parameter.dtype, torch.float32)
            setattr(self.module, name, nn.Parameter(parameter.detach().to(master)))

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: a copy starts as the base model's own module."""

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = compute_dtype(x) if x.is_floating_point() else self.site.stored.dtype
        cast = {name: p.to(dtype) for name, p in self.module.named_parameters() if p.dtype != dtype}
        return (
            torch.func.functional_call(self.module, cast, (x, *args), kwargs)
            if cast
            else self.module(x, *args, **kwargs)
        )

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        weight = self.site.linear.read_rows(self.module.weight, rows)  # type: ignore[arg-type]
        bias = self.module.bias
        return weight.to(W.dtype), None if b is None else bias[rows].to(b.dtype)  # type: ignore[index]
