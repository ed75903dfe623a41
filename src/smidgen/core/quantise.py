"""Holding a model's linear layers in few bits: one that is in memory, or one that is read tensor by tensor.

    smidgen.quantise(model, "nf4")          before adapters are attached; the layers stay the same objects

Embeddings, norms, biases, the head and layers whose weight is tied to another stay as they are, as in QLoRA:
Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from .attach import is_adapted
from .errors import AttachError, TargetError, require
from .quantised import format_named
from .quantised_linear import QuantisedLinear, quantise_
from .safe import read_header, read_into, read_tensors
from .site import Site
from .storage import storage_of
from .targets import Targets, head_modules, modules_of

_TIED = "its weight is tied to another layer's"


@dataclass(frozen=True)
class Quantised:
    """What was quantised.   left: path of a linear layer that stays as it is -> why.   Sizes are of all weights."""

    format: str
    layers: tuple[str, ...]
    left: Mapping[str, str]
    size_bytes: int
    plain_bytes: int  # what the model would take without

    def __str__(self) -> str:
        linear = len(self.layers) + len(self.left)
        return (
            f"{len(self.layers)} of {linear} linear layers are held as {self.format}: {_megabytes(self.size_bytes)} "
            f"of weights instead of {_megabytes(self.plain_bytes)}"
        )


def quantise(model: nn.Module, format: str = "nf4", targets: Targets | str | Sequence[str] | None = None) -> Quantised:
    """Hold linear layers of a model in few bits, and freeze these.

    format: "nf4", 4.1 bits for each weight, or "int8".   targets: which layers; by default all linear ones outside the
    head.  A layer is one that is nn.Linear itself, not a subclass.
    Raises ConfigError, TargetError or AttachError before anything is changed, and NonFiniteError at a broken weight.
    """
    chosen, left = quantisable(model, format, targets)
    for layer in chosen.values():
        quantise_(layer, format_named(format))
    return _quantised(model, format, left)


def quantised_of(model: nn.Module) -> Quantised | None:
    """What of a model is quantised; None if nothing is."""
    found = next((module for _, module in modules_of(model) if isinstance(module, QuantisedLinear)), None)
    left = {path: "is plain" for path, module in modules_of(model) if type(module) is nn.Linear}
    return None if found is None else _quantised(model, found.format_name, left)


def quantisable(
    model: nn.Module, format: str, targets: Targets | str | Sequence[str] | None = None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to be quantised by path, and those that are left with the reason.  Raises as `quantise`."""
    format_named(format)
    chosen, left = _by_default(model)
    if targets is not None:
        sites = Targets.of(targets).resolve(model, _reason).sites
        chosen, left = {site.path: cast(nn.Linear, site.layer) for site in sites}, {}
    linear = {path: module for path, module in modules_of(model) if isinstance(module, nn.Linear)}
    left |= {path: "not named" for path in linear if path not in chosen and path not in left}
    adapted = [path for path in chosen if is_adapted(linear[path])]
    require(
        not adapted, f"{', '.join(adapted[:5])}: adapters live there. Quantise the base first, then attach", AttachError
    )
    tied = [path for path, layer in chosen.items() if _holders(model)[id(layer.weight)] > 1]
    require(not tied, f"{', '.join(tied[:5])}: {_TIED}, which would go on without it. Leave it out", TargetError)
    if not chosen:
        kinds = Counter(type(module).__name__ for _, module in modules_of(model) if "weight" in module._parameters)
        there = ", ".join(f"{count} {name}" for name, count in kinds.most_common(5)) or "no weights"
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:3])
        raise TargetError(
            f"{type(model).__name__} has no linear layer to quantise: it has {there}.{f' {why}.' if why else ''} "
            "Use it unquantised"
        )
    return chosen, left


def load_quantised(model: nn.Module, files: Iterable[Path], format: str) -> Quantised | None:
    """Fill a model whose parameters are on the meta device from safetensors files, quantising what is to be.

    One tensor stands in memory in full at a time, beside what was made of those before.  Parameters get the dtype that
    the model has; tied ones are filled together, and buffers that are not in a file stay as they are.
    None, with nothing changed, unless names and shapes in the files are those that the model has.
    Raises FolderError where a file is damaged, TargetError if there is nothing to quantise.
    """
    chosen, left = quantisable(model, format)
    places, found = _places(model), {}
    headers = {path: read_header(path) for path in files}
    for path, header in headers.items():
        for name, entry in header.tensors.items():
            own = _name_in(model, name, places)
            if own is None or entry.shape != tuple(_tensor(places[own]).shape):
                return None
            found[id(places[own])] = path, name, own  # once for each tied tensor
    if any(id(holders) not in found for holders in places.values()):
        return None
    weights = {f"{path}.weight".lstrip("."): layer for path, layer in chosen.items()}
    sizes = [headers[path].tensors[name] for path, name, own in found.values() if own in weights]
    # one memory for all: pieces among tensors that come and go would leave holes that none of these fits
    memory = torch.empty(max(entry.end - entry.begin for entry in sizes), dtype=torch.uint8)
    for path, name, own in found.values():
        if own in weights:
            quantise_(weights[own], format_named(format), read_into(memory, path, headers[path], name))
        else:
            _fill(places[own], read_tensors(path, headers[path], [name])[name])
    return _quantised(model, format, left)


Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[str, list[Place]]:
    """Name of each parameter and kept buffer -> where it is, first under that name; tied ones have several places."""
    by_tensor: dict[int, list[Place]] = {}
    places: dict[str, list[Place]] = {}
    for path, module in modules_of(model):
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                shared = by_tensor.setdefault(id(tensor), [])
                shared.append((module, name))
                places[f"{path}.{name}".lstrip(".")] = shared
    return places


def _tensor(holders: list[Place]) -> Tensor:
    module, name = holders[0]
    return cast(Tensor, getattr(module, name))


def _fill(holders: list[Place], W: Tensor) -> None:
    """Put a tensor into all its places, in the dtype of the one that was there."""
    before = _tensor(holders)
    value = W.to(before.dtype)
    if isinstance(before, nn.Parameter):
        parameter = nn.Parameter(value, before.requires_grad)
        for module, name in holders:
            module._parameters[name] = parameter
    else:
        for module, name in holders:
            module._buffers[name] = value


def _name_in(model: nn.Module, name: str, places: Mapping[str, object]) -> str | None:
    """What a tensor of a file is called in the model: a body may be saved with its head, and one with it without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in places:
            return candidate
    return None


def _by_default(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    head, wide = head_modules(model), getattr(model, "_keep_in_fp32_modules", None) or ()
    held, chosen, left = _holders(model), {}, {}
    for path, module in modules_of(model):
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason(Site.at(path, module))
        if any(path == h or path.startswith(h + ".") for h in head):
            reason = "part of the head"
        elif held[id(module._parameters.get("weight"))] > 1:
            reason = _TIED
        elif any(part in wide for part in path.split(".")):
            reason = "the model keeps it in float32"
        if reason is None:
            chosen[path] = module
        else:
            left[path] = reason
    return chosen, left


def _holders(model: nn.Module) -> Counter[int]:
    """In how many places each parameter is."""
    return Counter(id(p) for _, module in modules_of(model) for p in module._parameters.values() if p is not None)


def _reason(site: Site) -> str | None:
    """None if a site is a layer that can be quantised, else why not."""
    kind = getattr(type(site.layer), "base_class", type(site.layer))
    if site.parameter is not None or kind is not nn.Linear:
        return f"{type(site.layer).__name__} is not nn.Linear itself, whose weight alone can be held in few bits"
    return None if storage_of(site.stored).plain else f"its weight is held as {storage_of(site.stored).name} already"


def _quantised(model: nn.Module, format: str, left: dict[str, str]) -> Quantised:
    layers = {path: m for path, m in modules_of(model) if isinstance(m, QuantisedLinear)}
    tensors = {id(t): t.nbytes for _, module in modules_of(model) for t in _own(module)}
    size = sum(tensors.values())
    held = sum(piece.nbytes for layer in layers.values() for piece in layer.pieces.values())
    plain = sum(layer.weight.numel() * layer.weight_dtype.itemsize for layer in layers.values())
    return Quantised(format, tuple(layers), left, size, size - held + plain)


def _own(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
