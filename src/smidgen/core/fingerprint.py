"""Fingerprint: a short text that tells one base model from another of the same shape, in a few milliseconds.

    "1-<structure>-<linear weights>-<the rest>"      the last two are "?" where the numbers cannot be read

structure: names and shapes of all base parameters.   The other two: up to 32 values of every parameter, rounded to
bf16, so that an fp32 and a bf16 copy of one checkpoint agree.   A quantised model has "?" for its linear weights and
agrees with the same checkpoint unquantised; who has to find a base as it was, a run that is resumed, asks for
`fingerprint_as_held`.   Buffers do not count: running statistics move when a model is run in
training mode, and libraries keep or drop constant ones from version to version.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import LinearKind, kind_of
from .quantised_linear import QuantisedLinear, own_weights
from .storage import storage_of
from .targets import modules_of

SAMPLE = 32  # values of each parameter
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
_cache: "WeakKeyDictionary[nn.Module, tuple[object, str]]" = WeakKeyDictionary()
_pinned: "WeakKeyDictionary[nn.Module, dict[str, bytes]]" = WeakKeyDictionary()  # parameter -> its sampled values


def fingerprint(model: nn.Module, leave_out: Iterable[str] = ()) -> str:
    """The fingerprint of a model's base weights: adapters do not count.

    leave_out: dotted paths of modules that do not count either, with all below them: heads trained whole.
    Computed again only after a parameter was replaced or changed in place.
    """
    out = frozenset(leave_out)
    parameters = [found for found in _parameters(model) if not _is_below(found[0], out)]
    state = (
        out,
        tuple((name, id(p), p.data_ptr() if type(p) is nn.Parameter else 0, p._version) for name, _, p in parameters),
    )
    if model not in _cache or _cache[model][0] != state:
        _cache[model] = (state, _compute(parameters, _pinned.get(model)))
    return _cache[model][1]


def fingerprint_as_held(model: nn.Module) -> str:
    """The fingerprint, and behind it, if weights are held in few bits, a digest of what holds them: the same base
    unquantised has another one.
    """
    parameters = list(_parameters(model))
    pieces = {
        f"{name}.{piece}": tensor
        for name, layer, _ in parameters
        if name.endswith(".weight") and isinstance(layer, QuantisedLinear)
        for piece, tensor in layer.pieces.items()
    }
    if not pieces:
        return fingerprint(model)
    exact = _samples([tensor for tensor in pieces.values() if not tensor.is_meta], None)
    rounded = _samples(_plain(parameters))  # linear ones too, which the fingerprint does not know beside quantised ones
    named = [(name, rounded.get(id(p))) for name, _, p in parameters]
    named += [(name, exact.get(id(tensor))) for name, tensor in pieces.items()]
    digest = hashlib.sha256()
    for name, sample in named:
        digest.update(f"{name}\n".encode() + (sample or b""))
    return f"{fingerprint(model)}-{digest.hexdigest()[:16]}"


def pin_fingerprint(model: nn.Module) -> None:
    """From now on the model's fingerprint is that of the values it has now: for weights that are about to be spread
    over several processes, of which none could look at them all later.
    """
    parameters = list(_parameters(model))
    samples = _samples(_plain(parameters))
    _pinned[model] = {name: samples[id(p)] for name, _, p in parameters if id(p) in samples}


def same_base(one: str, other: str) -> bool:
    """True if two fingerprints can be of the same base model: what both know is equal."""
    parts, others = one.split("-"), other.split("-")
    return len(parts) == len(others) == 4 and all(a == b or "?" in (a, b) for a, b in zip(parts, others, strict=True))


def _compute(parameters: list[tuple[str, nn.Module, nn.Parameter]], pinned: dict[str, bytes] | None) -> str:
    structure = hashlib.sha256()
    values = {True: hashlib.sha256(), False: hashlib.sha256()}  # linear weights, the rest
    known = {True: True, False: True}
    samples = _samples(_plain(parameters)) if pinned is None else {}
    for name, layer, parameter in parameters:
        linear = name.endswith(".weight") and isinstance(kind := kind_of(layer), LinearKind)
        shape = kind.fans(layer) if linear else tuple(parameter.shape)  # type: ignore[union-attr]  # not the packed one
        structure.update(f"{name} {list(shape)}\n".encode())
        sample = samples.get(id(parameter)) if pinned is None else pinned.get(name)
        known[linear] &= sample is not None
        values[linear].update(sample or b"")
    texts = [values[linear].hexdigest()[:16] if known[linear] else "?" for linear in (True, False)]
    return "-".join(["1", structure.hexdigest()[:16], *texts])


def _plain(parameters: list[tuple[str, nn.Module, nn.Parameter]]) -> list[Tensor]:
    """Those whose numbers can be read."""
    return [p for _, _, p in parameters if storage_of(p).plain and not p.is_meta]


def _samples(tensors: list[Tensor], dtype: torch.dtype | None = torch.bfloat16) -> dict[int, bytes]:
    """The bytes of some values of each tensor by id, in this dtype or in its own; one transfer per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor)
    found = {}
    for (_, own), group in groups.items():
        pieces = [_sample(tensor) for tensor in group]
        values = torch.cat(pieces).to(dtype or own).cpu()
        data, begin = bytes(values.view(torch.uint8).tolist()), 0
        for tensor, piece in zip(group, pieces, strict=True):
            end = begin + values.element_size() * piece.numel()
            found[id(tensor)] = data[begin:end]
            begin = end
    return found


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(flat.numel() // SAMPLE, 1) | 1  # odd: else a power of two samples one column only
    return flat[: step * SAMPLE : step]


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    seen: set[int] = set()
    for path, module in modules_of(model):
        for name, parameter in own_weights(module).items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parts = [part for part in path.split(".") if part and part not in _WRAPPERS]
                yield ".".join([*parts, name]), module, cast(nn.Parameter, parameter)


def _is_below(name: str, paths: frozenset[str]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)
