"""Head: train a module or a parameter whole, as a copy that travels with the adapter; HF PEFT's `modules_to_save`.

    W' = any value          trainable parameters: all of the module's

By itself it is a linear probe: `attach(model, Head(targets="classifier"))`.  Beside another method it is said with
`heads`: `LoRA(heads=("classifier", "*.q_proj.bias"))`.  The base model's own values stay as they were.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import HELD, Adapter, Call
from ..core.attach import bare_call, replaced
from ..core.disk_names import DiskNames
from ..core.method import Method, method
from ..core.quantised_linear import own_weights
from ..core.site import Site
from ..core.storage import master_dtype, storage_of
from ..core.targets import Targets, head_modules


@method("head")
@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """A trained copy of whole modules, by default of the model's head."""

    summary = "W' = any value; the module is trained whole"
    paper = "linear probing: Alain & Bengio 2016, arXiv:1610.01644"
    disk = DiskNames("SMIDGEN_HEAD")

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            plain = site.storage.plain
            return None if plain else f"a parameter held as {site.storage.name} cannot be trained whole"
        if not own_weights(site.layer):
            return f"{type(site.layer).__name__} has no parameters of its own"
        held = next((storage_of(p) for p in own_weights(site.layer).values() if not storage_of(p).plain), None)
        if held is not None:
            return f"a weight held as {held.name} cannot be trained whole; load the base unquantised"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        return leaves(model, head_modules(model)), {}

    def build(self, site: Site) -> Adapter:
        if site.parameter is not None:
            return ParameterHeadAdapter(site)
        return HeadAdapter(site) if site.kind else ModuleHeadAdapter(site)


def head_sites(model: nn.Module, heads: tuple[str, ...], parameters: list[str]) -> list[Site]:
    """The modules that these patterns name, down to those that have parameters; else the single parameters they name.

    parameters: names of the base model's.   Raises TargetError on a pattern that matches neither.
    """
    modules = {path: module for path, module in model.named_modules() if path and HELD not in path.split(".")}
    whole: dict[str, None] = {}
    single: dict[str, None] = {}
    for head in heads:
        pattern = Targets(head)
        found = [path for path, module in modules.items() if pattern.matches(path, module)]
        named = [] if found else [name for name in parameters if pattern.matches(name, model)]
        if not found and not named:
            pattern.resolve(model, lambda site: None)  # says what is near
        whole |= dict.fromkeys(found)
        single |= dict.fromkeys(named)
    outermost = [path for path in whole if not any(path.startswith(f"{other}.") for other in whole)]
    sites = [Site.at(path, modules[path]) for path in leaves(model, outermost)]
    for path, _, name in (name.rpartition(".") for name in single):
        sites.append(Site.at(path, model.get_submodule(path), name))
    return sites


def leaves(model: nn.Module, paths: list[str]) -> list[str]:
    """The modules at or below these paths that have parameters of their own."""
    found = []
    for path in paths:
        for sub, module in model.get_submodule(path).named_modules(prefix=path):
            if HELD not in sub.split(".") and any(True for _ in module.parameters(recurse=False)):
                found.append(sub)
    return found


class HeadAdapter(Adapter):
    """The layer's own parameters and buffers in fp32 or better, under `module`; the layer runs with these."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.module = nn.Module()
        for name, parameter in site.layer.named_parameters(recurse=False):
            self.module.register_parameter(name, nn.Parameter(parameter.detach().clone().to(master_dtype(parameter))))
        for name, buffer in site.layer.named_buffers(recurse=False):
            persistent = name not in site.layer._non_persistent_buffers_set
            self.module.register_buffer(name, buffer.detach().clone(), persistent=persistent)

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: a copy starts as the base model's own module."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        layer = self.site.layer
        own = {name: p.to(cast(Tensor, layer._parameters[name]).dtype) for name, p in self.module.named_parameters()}
        with replaced(layer, own | dict(self.module.named_buffers())):
            return bare_call(layer)(*args, **kwargs)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        own = dict(self.module.named_parameters())
        weight = self.site.linear.read_rows(own["weight"], rows)
        return weight.to(W.dtype), None if b is None else own["bias"].flatten()[rows].to(b.dtype)


class ModuleHeadAdapter(HeadAdapter):
    """Of a module that is no plain layer, such as an attention: what its rows are only its own code knows."""

    by_row = mergeable = False


class ParameterHeadAdapter(Adapter):
    """One parameter's value in fp32 or better, in its stored shape."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.value = nn.Parameter(site.stored.detach().clone().to(master_dtype(site.stored)))

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: a copy starts as the base model's own value."""

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.site.linear.read_rows(self.value, rows).to(W.dtype), b
