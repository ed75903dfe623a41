"""Read an adapter folder: everything is checked against the model before memory is taken or the model is touched."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.composition import Expression, names_in
from ..core.errors import FolderError, SmidgenError
from ..core.files import recover
from ..core.fingerprint import fingerprint, same_base
from ..core.method import Method, method_named
from ..core.safe import DTYPES, Entry, Header, read_header, read_json, read_tensors, tensor_sha256
from ..core.site import Site
from ..core.targets import Resolution, Targets
from .layout import PREFIX, Modules, Stored, canonical, clean, expected_tensors, site_key
from .note import NOTE, Note, Place, Several, composition, read_note
from .peft_fields import WITHOUT_EFFECT
from .translation import PeftTranslation, in_order, plain
from .translations import peft_method, translation_of
from .write import CONFIG, WEIGHTS, all_stored, as_read, config_fields, finite, kind_name

HeadSites = Callable[[Method], list[Site]]
_NOT_NUMBERS = (
    RuntimeError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    KeyError,
    IndexError,
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One adapter, read and checked, not yet on the model."""

    name: str
    saved_as: str  # the name it had when it was written, which `Content.active` uses
    method: Method
    resolution: Resolution
    tensors: Mapping[tuple[str, str], Tensor]  # (site name, tensor name) -> value

    def fill(self, parts: Mapping[str, Adapter]) -> None:
        """Make these the tensors of the adapter's parts.  Whether they are trained stays as it was."""
        for (site, name), value in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = parts[site].get_submodule(path)
            if leaf in owner._buffers:
                owner._buffers[leaf] = value.to(cast(Tensor, owner._buffers[leaf]).device)
                continue
            parameter = cast(nn.Parameter, owner._parameters[leaf])
            if parameter.is_meta:  # the base has no memory yet; the adapter has
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            else:
                parameter.data = value.to(parameter.device)


@dataclass(frozen=True, kw_only=True)
class Content:
    """The adapters of a folder, and what of them is to act (None: the folder does not say)."""

    adapters: tuple[Loaded, ...]
    active: Expression


def read_folder(
    folder: str | Path, model: nn.Module, name: str | None, *, check_base: bool, head_sites: HeadSites
) -> Content:
    """Read what `write_folder` or HF PEFT wrote, for this model.  Raises FolderError; the model is not touched.

    name: what to call the one adapter of a folder; of several, which one to read.
    check_base: refuse an adapter that was trained on another base model.
    head_sites: the sites of a method's heads in the model.
    """
    folder = _existing(folder)
    note = read_note(folder)
    places, active = _locate(folder, note, name)
    reader = _Reader(model, check_base, head_sites)
    loaded = tuple(reader.read(path, called) for called, path in places)
    if len(loaded) == 1 and isinstance(note, Note):
        active = composition({"composition": note.composition}, folder / NOTE)
    if not set(names_in(active)) <= {adapter.saved_as for adapter in loaded}:
        active = None
    return Content(adapters=loaded, active=active)


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What the writer kept with the adapter under `extra`; empty for a folder of HF PEFT's.  Raises FolderError."""
    note = read_note(_existing(folder))
    return dict(note.extra) if note else {}


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    recover(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}")
    return folder


def _locate(
    folder: Path, note: Note | Several | None, name: str | None
) -> tuple[list[tuple[str | None, Path]], Expression]:
    """Which folders to read, and as what: the root, or the sub-folders that are adapters."""
    if isinstance(note, Several):
        below = list(note.adapters)
        active = composition({"composition": note.composition}, folder / NOTE)
    else:
        if note is None and not (folder / CONFIG).exists():
            below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        else:  # HF PEFT has its "default" at the root and others beside it
            below = [name] if name and not set("/\\") & set(name) and (folder / name / CONFIG).is_file() else []
        active = None
        if not below:
            return [(name, folder)], None
    if name is not None:
        if name not in below:
            raise FolderError(f'{folder} has no adapter "{name}"; it has {", ".join(below)}')
        below, active = [name], None
    outside = [sub for sub in below if (folder / sub).resolve() != folder.resolve() / sub]
    if outside:
        raise FolderError(f"{folder / outside[0]} is a link; copy the adapter itself there")
    return [(sub, folder / sub) for sub in below], active


class _Reader:
    """Reads adapters for one model."""

    def __init__(self, model: nn.Module, check_base: bool, head_sites: HeadSites) -> None:
        self.model, self.check_base, self.head_sites = model, check_base, head_sites
        self.modules = Modules(model)

    def read(self, folder: Path, name: str | None) -> Loaded:
        """One adapter."""
        config, header, note = read_json(folder / CONFIG), read_header(folder / WEIGHTS), read_note(folder)
        if isinstance(note, Several):
            raise FolderError(f"{folder / NOTE} says that adapters are in sub-folders, but {CONFIG} is beside it")
        try:
            return self._read(folder, name, config, header, note)
        except _NOT_NUMBERS as error:
            raise FolderError(f"{folder}: its settings cannot be: {str(error)[:300]}") from error
        except SmidgenError as error:
            text = str(error)
            raise FolderError(text if text.startswith(str(folder)) else f"{folder}: {text}") from error

    def _read(
        self, folder: Path, name: str | None, config: Mapping[str, Any], header: Header, note: Note | None
    ) -> Loaded:
        keys = self._keys(header)
        if note is None:
            method, sites, theirs = self._from_peft(config, header, keys)
        else:
            method, sites, theirs = self._from_note(config, note)
        heads = self.head_sites(method)
        self._check_places(method, sites, note)
        method = self._with_tensors(method, sites, lambda key: _without_memory(header.tensors[keys[key]]), keys)
        expected = expected_tensors(method, sites, heads)
        translation = translation_of(type(method))
        stored = all_stored(translation, method, sites, heads, expected, theirs=theirs)
        copies = self._check_shapes(folder, stored, expected, header, keys, note)
        if note is not None:
            self._check_agreement(method, sites, heads, config, theirs)
            self._check_base(note, heads, sites if method.name == "head" else ())
        read = read_tensors(folder / WEIGHTS, header, [keys[canonical(entry.key)] for entry in stored])
        self._check_values(folder, read, note)
        self._check_copies(folder, header, copies)
        method = self._with_tensors(method, sites, lambda key: read[keys[key]], keys)
        tensors = {}
        for entry in stored:
            values = entry.unpack(read[keys[canonical(entry.key)]])
            for (site, tensor_name), value in zip(entry.holds, values, strict=True):
                tensors[site, tensor_name] = value.to(expected[site][tensor_name].dtype).contiguous()
        saved_as = note.name if note else "default"
        resolution = Resolution(self.model, tuple(sites))
        return Loaded(name=name or saved_as, saved_as=saved_as, method=method, resolution=resolution, tensors=tensors)

    def _keys(self, header: Header) -> dict[str, str]:
        """Key as we write it -> key in the file.  Raises FolderError if two come to one."""
        keys: dict[str, str] = {}
        for raw in header.tensors:
            key = canonical(raw)
            if key in keys:
                raise FolderError(f"two tensors are the same place: {keys[key]!a:.120} and {raw!a:.120}")
            keys[key] = raw
        return keys

    def _from_note(self, config: Mapping[str, Any], note: Note) -> tuple[Method, list[Site], bool]:
        method_class = method_named(note.method)
        translation, peft_type = translation_of(method_class), config.get("peft_type")
        theirs = isinstance(translation, PeftTranslation) and peft_type == translation.peft_type
        if not theirs and peft_type != f"SMIDGEN_{method_class.name.upper()}":
            raise FolderError(
                f"{CONFIG} is of {str(peft_type)[:80]!r}, {NOTE} of {note.method!r}: they belong to different adapters"
            )
        for field, value in note.settings.items():
            if field in translation.globs or field.endswith("_pattern"):
                for pattern in value:
                    plain(pattern, field)
        missing = [f"{p.path}.{p.parameter}" if p.parameter else p.path for p in note.sites if not self._is_there(p)]
        if missing:
            raise FolderError(
                f"does not fit this model: {len(missing)} of {len(note.sites)} places are not in "
                f"{type(self.model).__name__}: {', '.join(missing[:5])}. {_trained_on(note)}"
            )
        sites = [self.modules.site(place.path, place.parameter) for place in note.sites]
        settings = {
            field: in_order(value) if field.endswith("_pattern") else _frozen(value)
            for field, value in note.settings.items()
        }
        return self._method(method_class, settings, sites, note.heads), sites, theirs

    def _is_there(self, place: Place) -> bool:
        if place.path not in self.modules or place.parameter is None:
            return place.path in self.modules
        owner, _, name = place.parameter.rpartition(".")
        layer = self.modules.get(".".join(part for part in (place.path, owner) if part))
        return layer is not None and layer._parameters.get(name) is not None

    def _from_peft(
        self, config: Mapping[str, Any], header: Header, keys: Mapping[str, str]
    ) -> tuple[Method, list[Site], bool]:
        if str(config.get("peft_type")).startswith("SMIDGEN_"):
            raise FolderError(f"is of {str(config['peft_type'])[:80]!r}, but its {NOTE} is missing")
        method_class, translation = peft_method(config.get("peft_type"))
        shapes = {key: header.tensors[raw].shape for key, raw in keys.items()}
        found = translation.find(self.modules, config, shapes)
        if not found.sites:
            some = ", ".join(list(header.tensors)[:3])[:300]
            raise FolderError(
                f"does not fit this model: none of its {len(header.tensors)} tensors has a place in "
                f"{type(self.model).__name__}: {some} ..."
            )
        heads = self._heads_of(config, shapes, translation.prefix)
        return self._method(method_class, found.settings, found.sites, heads), list(found.sites), True

    def _heads_of(self, config: Mapping[str, Any], shapes: Mapping[str, Any], prefix: str) -> list[str]:
        """The modules that HF PEFT trained whole: those that modules_to_save names and that are in the file."""
        named = config.get("modules_to_save") or []
        if not isinstance(named, list):
            raise FolderError(f"modules_to_save is {str(named)[:80]!r}, not a list of names")
        parts = [plain(name, "modules_to_save") for name in named]
        heads = dict.fromkeys(key.removeprefix(prefix).rpartition(".")[0] for key in shapes)
        return [
            head
            for head in heads
            if head in self.modules
            and any(_ancestor.endswith(tuple(parts)) for _ancestor in _ancestors(head) if parts)
            and any(True for _ in self.modules[head].parameters(recurse=False))
        ]

    def _method(
        self, cls: type[Method], settings: Mapping[str, Any], sites: Sequence[Site], heads: Sequence[str]
    ) -> Method:
        return cls(targets=Targets.exactly(site.path for site in sites), heads=tuple(heads), **settings)

    def _with_tensors(
        self, method: Method, sites: Sequence[Site], value: Callable[[str], Tensor], keys: Iterable[str]
    ) -> Method:
        """`Method.with_tensors`, for those that have it, with what stands in the file for each site."""
        if type(method).with_tensors is Method.with_tensors:
            return method
        own_names = {suffix: name for name, suffix in method.disk.tensors.items()}
        tensors: dict[Site, dict[str, Tensor]] = {}
        for site in sites:
            begin = site_key(site, "", "")
            found = {key: key[len(begin) + 1 :] for key in keys if key.startswith(begin + ".")}
            tensors[site] = {own_names.get(suffix, suffix): value(key) for key, suffix in found.items()}
        return method.with_tensors(tensors)

    def _check_places(self, method: Method, sites: Sequence[Site], note: Note | None) -> None:
        wrong = [
            f"{site.name}: {reason}"
            for site in sites
            if site.path and (reason := method.accepts(site))  # the whole model is the method's own affair
        ]
        for site, place in zip(sites, note.sites if note else (), strict=False):
            if kind_name(site) != place.kind:
                here = kind_name(site) or type(site.layer).__name__
                wrong.append(f"{site.name} is {here}, was {place.kind} where it was trained")
        if wrong:
            raise FolderError(f"does not fit this model: {'; '.join(wrong[:5])}")

    def _check_shapes(
        self,
        folder: Path,
        stored: Sequence[Stored],
        expected: Mapping[str, Mapping[str, Tensor]],
        header: Header,
        keys: Mapping[str, str],
        note: Note | None,
    ) -> list[str]:
        """All that does not fit, in one error.  Returns the keys of HF PEFT's copies of the base's weights."""
        problems, known = [], set()
        for entry in stored:
            key = canonical(entry.key)
            known.add(key)
            needed = entry.pack([expected[site][name] for site, name in entry.holds])
            if key not in keys:
                problems.append(f"{key} is missing")
                continue
            found = header.tensors[keys[key]]
            if found.shape != tuple(needed.shape):
                problems.append(f"{key} is {found.shape}, the model and the settings need {tuple(needed.shape)}")
            elif needed.is_floating_point() != (found.dtype[0] in "FB" and found.dtype != "BOOL"):
                problems.append(f"{key} is {found.dtype}, it should be {needed.dtype}")
        extra = [key for key in keys if key not in known]
        copies = [
            key for key in extra if note is None and self._copied(key, header.tensors[keys[key]].shape) is not None
        ]
        problems += [f"{key[:200]} has no place" for key in extra if key not in copies]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise FolderError(
                f"{folder} does not fit this model. {len(problems)} of {len(header.tensors)} tensors: "
                f"{'; '.join(problems[:8])}{more}. {_trained_on(note)}"
            )
        return [keys[key] for key in copies]

    def _copied(self, key: str, shape: Sequence[int]) -> Tensor | None:
        """The base's own tensor that a key of HF PEFT's is a copy of: embeddings, biases of layers."""
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        layer = self.modules.get(path.removesuffix(".base_layer"))
        if layer is None or not (path.endswith(".base_layer") or layer in _embeddings(self.model)):
            return None
        tensor = layer._parameters.get(name)
        return tensor if tensor is not None and tuple(tensor.shape) == tuple(shape) else None

    def _check_agreement(
        self, method: Method, sites: Sequence[Site], heads: Sequence[Site], config: Mapping[str, Any], theirs: bool
    ) -> None:
        ours = as_read(config_fields(self.modules, method, sites, heads, theirs=theirs))
        differ = [
            f"{field} ({str(config[field])[:60]}, {str(ours.get(field))[:60]})"
            for field in config
            if field not in WITHOUT_EFFECT and config[field] != ours.get(field) and (field in ours or config[field])
        ]
        if differ:
            raise FolderError(
                f"{CONFIG} and {NOTE} disagree on {', '.join(differ[:8])}: one of them was changed by hand"
            )

    def _check_base(self, note: Note, heads: Sequence[Site], more: Sequence[Site]) -> None:
        expected = note.base.get("fingerprint")
        if not self.check_base or not isinstance(expected, str):
            return
        found = fingerprint(self.model, leave_out=[clean(site.path) for site in (*heads, *more)])
        if not same_base(expected, found):
            raise FolderError(
                f"fits this model in shape, but was trained on other weights (fingerprint {expected[:80]}, "
                f"this model has {found}). {_trained_on(note)} If that is meant: load(..., check_base=False)"
            )

    def _check_values(self, folder: Path, read: Mapping[str, Tensor], note: Note | None) -> None:
        problems = []
        if note is not None:
            problems = [f"{key} is damaged" for key in read if tensor_sha256(read[key]) != note.tensors.get(key)]
        problems += [f"{key} holds NaN or infinity" for key, tensor in read.items() if not finite(tensor)]
        if problems:
            raise FolderError(f"{folder / WEIGHTS}: {len(problems)} of {len(read)} tensors: {'; '.join(problems[:8])}")

    def _check_copies(self, folder: Path, header: Header, copies: Sequence[str]) -> None:
        """HF PEFT copies embeddings into the file when they are targets; one that differs was trained."""
        for raw in copies:
            copy = read_tensors(folder / WEIGHTS, header, [raw])[raw]
            own = cast(Tensor, self._copied(canonical(raw), copy.shape)).detach().cpu()
            dtype = (
                min(copy.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).bits)
                if own.is_floating_point()
                else None
            )
            if dtype is None or not torch.equal(copy.to(dtype), own.to(dtype)):
                raise FolderError(
                    f"{raw} differs from the model's own: the base was changed when the adapter was trained. "
                    "Load the base that it belongs to"
                )


def _embeddings(model: Any) -> list[nn.Module]:
    """Of transformers' models: HF PEFT writes these whole if the vocabulary was resized."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    try:
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []


def _without_memory(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _trained_on(note: Note | None) -> str:
    if note is None:
        return "Is it for another model?"
    name, of_class = note.base.get("name"), note.base.get("class")
    return f"It was trained on {str(name or 'a model')[:200]} ({str(of_class)[:80]})."


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, as settings have them."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return value
