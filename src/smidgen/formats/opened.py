"""One adapter's files, opened and not yet believed: which method, with which settings, at which places of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import FolderError
from ..core.method import Method, method_named
from ..core.safe import DTYPES, Header, read_header, read_json
from ..core.site import Site
from ..core.targets import Targets
from ..methods.trainable_tokens import with_tied
from .layout import PREFIX, Modules, canonical, clean, site_key
from .note import NOTE, Note, Place, Several
from .translation import PeftTranslation, in_order, plain
from .translations import peft_method, translation_of
from .write import CONFIG, WEIGHTS

_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A folder's three files: settings, header and note, but no tensor yet."""

    folder: Path
    modules: Modules  # of the model that it is to be loaded into
    config: Mapping[str, Any]
    header: Header
    keys: Mapping[str, str]  # key as we write it -> key in the file
    note: Note | None

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.folder / WEIGHTS

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape in the file."""
        return self.header.tensors[self.keys[key]].shape

    def without_memory(self, key: str) -> Tensor:
        """The tensor's shape and dtype, on the meta device."""
        return torch.empty(self.shape(key), dtype=DTYPES[self.header.tensors[self.keys[key]].dtype], device="meta")

    def trained_on(self) -> str:
        """A sentence for messages on what does not fit."""
        if self.note is None:
            return "Is it for another model?"
        name, of_class = self.note.base.get("name"), self.note.base.get("class")
        return f"It was trained on {str(name or 'a model')[:200]} ({str(of_class)[:80]})."


def open_folder(folder: Path, modules: Modules, note: Note | Several | None) -> Opened:
    """Read all but the tensors of the folder of one adapter, whose note is known.  Raises FolderError."""
    config, header = read_json(folder / CONFIG), read_header(folder / WEIGHTS)
    if isinstance(note, Several):
        raise FolderError(f"{folder / NOTE} says that adapters are in sub-folders, but {CONFIG} is beside it")
    keys: dict[str, str] = {}
    for raw in header.tensors:
        key = canonical(raw)
        if key in keys:
            raise FolderError(f"{folder}: two tensors are the same place: {keys[key]!a:.120} and {raw!a:.120}")
        keys[key] = raw
    return Opened(folder=folder, modules=modules, config=config, header=header, keys=keys, note=note)


def with_tokens_apart(opened: Opened) -> list[Opened]:
    """The adapter, and after it the rows of tokens that HF PEFT trained beside it (`trainable_token_indices`)."""
    named = opened.config.get("trainable_token_indices")
    if not named or opened.note is not None:
        return [opened]
    by_layer = named if isinstance(named, dict) else {"": named}
    found, rest = [], dict(opened.keys)
    for path in [key.removeprefix(PREFIX).removesuffix(_TOKENS) for key in opened.keys if key.endswith(_TOKENS)]:
        tokens = next((rows for end, rows in by_layer.items() if not end or f".{path}".endswith(f".{end}")), None)
        config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": tokens, "target_modules": [path]}
        raw = rest.pop(f"{PREFIX}{path}{_TOKENS}")
        places = with_tied(opened.modules.model, [opened.modules.site(path)] if path in opened.modules else [])
        own = [clean(site.path) for site in places] or [path]  # of tied layers it writes the rows once
        keys = {f"{PREFIX}{place}.{_TOKENS.rpartition('.')[2]}": raw for place in own}
        found.append(replace(opened, config=config, keys=keys))
    config = {field: value for field, value in opened.config.items() if field != "trainable_token_indices"}
    return [replace(opened, config=config, keys=rest), *found]


def method_and_sites(opened: Opened) -> tuple[Method, list[Site], bool]:
    """The method, where it lives, and whether the file is in HF PEFT's layout.  Raises FolderError."""
    return _of_peft(opened) if opened.note is None else _of_note(opened, opened.note)


def with_tensors(method: Method, sites: Sequence[Site], keys: Iterable[str], value: Callable[[str], Tensor]) -> Method:
    """`Method.with_tensors`, for methods that have it, with what the file holds for each site."""
    if not method.told_by_tensors:
        return method
    own_names = {suffix: name for name, suffix in method.disk.tensors.items()}
    tensors: dict[Site, dict[str, Tensor]] = {site: {} for site in sites}
    by_begin = {site_key(site, "", ""): found for site, found in tensors.items()}
    for key in keys:
        begin, dot, suffix = key.rpartition(".")
        while dot:  # a site may lie within another
            if begin in by_begin:
                by_begin[begin][own_names.get(suffix, suffix)] = value(key)
            begin, dot, last = begin.rpartition(".")
            suffix = f"{last}.{suffix}"
    return method.with_tensors(tensors)


def _of_note(opened: Opened, note: Note) -> tuple[Method, list[Site], bool]:
    method_class, modules = method_named(note.method), opened.modules
    translation, peft_type = translation_of(method_class), opened.config.get("peft_type")
    theirs = isinstance(translation, PeftTranslation) and peft_type == translation.peft_type
    if not theirs and peft_type != f"SMIDGEN_{method_class.name.upper()}":
        raise FolderError(
            f"{CONFIG} is of {str(peft_type)[:80]!r}, {NOTE} of {note.method!r}: they belong to different adapters"
        )
    for field, value in note.settings.items():
        if field in translation.globs or field.endswith("_pattern"):
            for pattern in value:
                plain(pattern, field)
    missing = [f"{p.path}.{p.parameter}" if p.parameter else p.path for p in note.sites if not _is_there(p, modules)]
    if missing:
        raise FolderError(
            f"does not fit this model: {len(missing)} of {len(note.sites)} places are not in "
            f"{type(modules.model).__name__}: {', '.join(missing[:5])}. {opened.trained_on()}"
        )
    sites = [modules.site(place.path, place.parameter) for place in note.sites]
    settings = {
        field: in_order(value) if field.endswith("_pattern") else _frozen(value)
        for field, value in note.settings.items()
    }
    return _method(method_class, settings, sites, note.heads), sites, theirs


def _is_there(place: Place, modules: Modules) -> bool:
    if place.path not in modules or place.parameter is None:
        return place.path in modules
    owner, _, name = place.parameter.rpartition(".")
    layer = modules.get(".".join(part for part in (place.path, owner) if part))
    return layer is not None and layer._parameters.get(name) is not None


def _of_peft(opened: Opened) -> tuple[Method, list[Site], bool]:
    config, peft_type = opened.config, str(opened.config.get("peft_type"))
    if peft_type.startswith("SMIDGEN_"):
        raise FolderError(f"is of {peft_type[:80]!r}, but its {NOTE} is missing")
    method_class, translation = peft_method(config)
    found = translation.find(opened.modules, config, {key: opened.shape(key) for key in opened.keys})
    if not found.sites:
        some = ", ".join(list(opened.header.tensors)[:3])[:300]
        raise FolderError(
            f"does not fit this model: none of its {len(opened.header.tensors)} tensors has a place in "
            f"{type(opened.modules.model).__name__}: {some} ..."
        )
    heads = _heads(opened, translation.prefix)
    method = _method(method_class, found.settings, found.sites, heads)
    return method, list(map(method.placed, found.sites)), True


def _heads(opened: Opened, prefix: str) -> list[str]:
    """The modules that HF PEFT trained whole: those that modules_to_save names and that are in the file."""
    named = opened.config.get("modules_to_save") or []
    if not isinstance(named, list):
        raise FolderError(f"modules_to_save is {str(named)[:80]!r}, not a list of names")
    ends = tuple(plain(name, "modules_to_save") for name in named)
    heads = []
    for path in dict.fromkeys(key.removeprefix(prefix).rpartition(".")[0] for key in opened.keys):
        layer, parts = opened.modules.get(path), path.split(".")
        saved = any(".".join(parts[: i + 1]).endswith(ends) for i in range(len(parts))) if ends else False
        if saved and layer is not None and layer._parameters:
            heads.append(path)
    return heads + _biases(opened, prefix)


def _biases(opened: Opened, prefix: str) -> list[str]:
    """The biases that HF PEFT trained, where `bias` says that it did: those in the file."""
    if opened.config.get("bias") in (None, "none"):
        return []
    found = []
    for key in opened.keys:
        path, _, name = key.removeprefix(prefix).removesuffix(".bias").partition(".base_layer")
        layer = opened.modules.get(path) if key.endswith(".bias") and not name else None
        if layer is not None and layer._parameters.get("bias") is not None:
            found.append(f"{path}.bias")
    return found


def _method(
    method_class: type[Method], settings: Mapping[str, Any], sites: Sequence[Site], heads: Sequence[str]
) -> Method:
    return method_class(targets=Targets.exactly(site.path for site in sites), heads=tuple(heads), **settings)


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, as settings have them."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return value
