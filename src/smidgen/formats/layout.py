"""What stands in `adapter_model.safetensors`: every tensor of an adapter under its site's name.

    base_model.model.<path of the layer>.<tensor>
    base_model.model.<path>.<parameter>.<tensor>      at a parameter site
    base_model.model.<path>.<tensor of the module>    heads, under the module's own names
    base_model.<tensor>                               tensors that all sites of an adapter share

Where Hugging Face PEFT has the method, its keys and shapes are written instead: see `peft_*.py`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.adapter import Adapter
from ..core.disk_names import DiskNames
from ..core.method import Method
from ..core.site import Site
from ..core.targets import modules_of
from ..methods.head import Head

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")  # torch.compile and FSDP put these into paths

Tensors = Mapping[str, Mapping[str, Tensor]]  # site name -> tensor name -> tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of the file, and the tensors of adapters that it holds: mostly one, as it is."""

    key: str
    holds: tuple[tuple[str, str], ...]  # (site name, tensor name)
    pack: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]  # what `holds` names -> as stored
    unpack: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)
    derived: bool = False  # written for HF PEFT; what it is made of stands in the file too, and that is read


def zeros(key: str, shape: tuple[int, ...]) -> Stored:
    """A tensor that HF PEFT has and we do not: zeros are written, and what is there is left aside."""
    return Stored(key, (), lambda tensors: torch.zeros(shape), lambda tensor: ())


def stored_tensors(disk: DiskNames, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
    """Our own layout of an adapter's tensors."""
    return [
        Stored(site_key(site, name, disk.tensors.get(name, name)), ((site.name, name),))
        for site in sites
        for name in tensors[site.name]
    ]


def site_key(site: Site, name: str, suffix: str) -> str:
    """The key of a site's tensor; what all sites share stands at the top."""
    if name.startswith("shared."):
        return f"base_model.{suffix}"
    return PREFIX + ".".join(part for part in (clean(site.name), suffix) if part)


def stored_heads(
    heads: Sequence[Site], tensors: Tensors, prefix: str = PREFIX, wrapped: frozenset[str] = frozenset()
) -> list[Stored]:
    """Heads stand under the names that the module itself has.

    wrapped: paths of the layers around which HF PEFT puts its own; what was theirs is `base_layer` then.
    """
    found = []
    for site in heads:
        path = prefix + clean(site.path) + ".base_layer" * (clean(site.path) in wrapped and site.parameter is not None)
        for name in tensors[site.name]:
            own = site.parameter or name.removeprefix("module.")
            found.append(Stored(f"{path}.{own}", ((site.name, name),)))
    return found


def tensors_of(parts: Mapping[str, Adapter]) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter that belong on disk, by site and name."""
    return {name: dict(part.state_dict(keep_vars=True)) for name, part in parts.items()}


def parts_without_memory(method: Method, sites: Sequence[Site], heads: Sequence[Site]) -> dict[str, Adapter]:
    """The parts of this adapter on the meta device: shapes and dtypes, without memory."""
    with _WithoutMemory():
        parts = {site.name: method.build(site) for site in sites}
        shared = method.shared(tuple(sites))
        if shared is not None:
            parts[sites[0].name].add_module("shared", shared)
        parts |= {site.name: Head().build(site) for site in heads}
    return parts


def is_all_of(part: Adapter, tensors: Collection[str]) -> bool:
    """True if a part without memory is whole once it has these tensors: it holds, shares and computes no others."""
    held = [*part.named_parameters(), *part.named_buffers()]
    return (
        type(part).prepare is Adapter.prepare
        and "shared" not in part._modules
        and all(name in tensors for name, _ in held)
        and not any(isinstance(value, Tensor) for module in part.modules() for value in vars(module).values())
    )


class _WithoutMemory(TorchFunctionMode):
    """Tensors made within this context have no memory, whatever device was asked for."""

    makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in self.makers:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        if func is Tensor.clone:  # the copy of a head
            return args[0].to("meta")
        return func(*args, **(kwargs or {}))


def clean(path: str) -> str:
    """A dotted path without what torch.compile and FSDP put into it."""
    if not any(wrapper in path for wrapper in WRAPPERS):
        return path
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def canonical(key: str) -> str:
    """A key as we write it: wrappers left out, the prefix there."""
    key = clean(key)
    return key if key.startswith("base_model.") else PREFIX + key


class Modules:
    """The modules of a model by clean path, the adapters that live there left out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found = {clean(path): (path, module) for path, module in modules_of(model)}

    def __contains__(self, path: str) -> bool:
        return path in self._found

    def __getitem__(self, path: str) -> nn.Module:
        return self._found[path][1]

    def get(self, path: str) -> nn.Module | None:
        """The module at this path, or None."""
        return self._found[path][1] if path in self._found else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def site(self, path: str, parameter: str | None = None) -> Site:
        """The site at a module, or at one of its parameters."""
        real, module = self._found[path]
        return Site.at(real, module, parameter)

    def ending(self, ends: Iterable[str]) -> set[str]:
        """Paths that are, or end after a dot with, one of these: what HF PEFT's `target_modules` list catches."""
        ends = tuple(ends)
        exact, dotted = set(ends), tuple(f".{end}" for end in ends)
        return {path for path in self._found if path in exact or path.endswith(dotted)}
