"""Read an adapter folder: everything is checked against the model before memory is taken or the model is touched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.composition import Expression, Stack, names_in
from ..core.errors import FolderError, SmidgenError
from ..core.files import recover
from ..core.method import Method
from ..core.site import Site
from ..core.targets import Resolution
from .checks import check_agreement, check_base, check_copies, check_places, check_shapes, read_checked
from .imported import Imported
from .layout import Modules, canonical, is_all_of, parts_without_memory, tensors_of
from .note import NOTE, Note, Several, composition, read_note
from .opened import Opened, method_and_sites, open_folder, with_tensors, with_tokens_apart
from .translations import translation_of
from .write import CONFIG, all_stored

# Projects whose folders are read and not written: the file here that reads them, and what they are known by.
_OTHERS = {
    "adapterhub": ("adapter_config.json", ("adapter.safetensors", "pytorch_adapter.bin")),
    "pyreft": ("config.json", ("intkey_*.bin",)),
}
HeadSites = Callable[[Method], list[Site]]
# What settings of the wrong type or size end in, when a method is made of them
_NO_SETTINGS = (RuntimeError, TypeError, ValueError, ArithmeticError, AssertionError, AttributeError, LookupError)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One adapter, read and checked, not yet on the model."""

    name: str
    saved_as: str  # the name it had when it was written, which `Content.active` uses
    method: Method
    resolution: Resolution
    tensors: Mapping[tuple[str, str], Tensor]  # (site name, tensor name) -> value
    parts: Mapping[str, Adapter] | None = None  # by site name, without memory, if the tensors are all that they hold

    def fill(self, parts: Mapping[str, Adapter]) -> None:
        """Make these the tensors of the adapter's parts.  Whether they are trained stays as it was."""
        for (site, name), value in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = parts[site].get_submodule(path)
            if leaf in owner._buffers:
                was = cast(Tensor, owner._buffers[leaf])
                owner._buffers[leaf] = value.to(parts[site].site.device if was.is_meta else was.device)
                continue
            parameter = cast(nn.Parameter, owner._parameters[leaf])
            if parameter.is_meta:
                value = value.to(parts[site].site.device)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            else:
                parameter.data = value.to(parameter.device)
        for part in parts.values():
            part.filled()


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
    folder, modules = _existing(folder), Modules(model)
    if (other := _other_project(folder)) is not None:
        return _of_other_project(folder, import_module(f"{__package__}.{other}").read, modules, name)
    note = read_note(folder)
    places, active = _locate(folder, note, name)
    loaded: tuple[Loaded, ...] = ()
    for called, path in places:
        first, *rest = (
            _read(opened, called, head_sites, with_base=check_base)
            for opened in with_tokens_apart(open_folder(path, modules, note if path == folder else read_note(path)))
        )
        beside = [_renamed(tokens, f"{first.name}_tokens", number) for number, tokens in enumerate(rest)]
        if beside and len(places) == 1:
            active = Stack(*(adapter.name for adapter in (first, *beside)))
            first = replace(first, saved_as=first.name)
        loaded += (first, *beside)
    if len(loaded) == 1 and isinstance(note, Note):
        active = composition({"composition": note.composition}, folder / NOTE)
    if not set(names_in(active)) <= {adapter.saved_as for adapter in loaded}:
        active = None
    return Content(adapters=loaded, active=active)


def _renamed(loaded: Loaded, name: str, number: int) -> Loaded:
    name += str(number + 1) if number else ""
    return replace(loaded, name=name, saved_as=name)


def _other_project(folder: Path) -> str | None:
    for project, (config, files) in _OTHERS.items():
        if (folder / config).is_file() and any(path.is_file() for file in files for path in folder.glob(file)):
            return project
    return None


def _of_other_project(
    folder: Path, read: Callable[[Path, Modules], list[Imported]], modules: Modules, name: str | None
) -> Content:
    try:
        found = [(each, each.checked()) for each in read(folder, modules)]
    except _NO_SETTINGS as error:
        raise FolderError(f"{folder}: its settings cannot be: {str(error)[:300]}") from error
    except SmidgenError as error:
        text = str(error)
        raise FolderError(text if text.startswith(str(folder)) else f"{folder}: {text}") from error
    adapters = []
    for each, tensors in found:
        called = "_".join(filter(None, (name or each.name, each.part)))
        resolution = Resolution(modules.model, each.sites)
        adapters.append(
            Loaded(name=called, saved_as=called, method=each.method, resolution=resolution, tensors=tensors)
        )
    names = [adapter.name for adapter in adapters]
    return Content(adapters=tuple(adapters), active=names[0] if len(names) == 1 else Stack(*names))


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


def _read(opened: Opened, name: str | None, head_sites: HeadSites, *, with_base: bool) -> Loaded:
    """One adapter.  Raises FolderError, naming its folder."""
    try:
        return _checked(opened, name, head_sites, with_base=with_base)
    except _NO_SETTINGS as error:
        raise FolderError(f"{opened.folder}: its settings cannot be: {str(error)[:300]}") from error
    except SmidgenError as error:
        text = str(error)
        raise FolderError(text if text.startswith(str(opened.folder)) else f"{opened.folder}: {text}") from error


def _checked(opened: Opened, name: str | None, head_sites: HeadSites, *, with_base: bool) -> Loaded:
    method, sites, theirs = method_and_sites(opened)
    heads = head_sites(method)
    check_places(opened, method, sites)
    built = method = with_tensors(method, sites, opened.keys, opened.without_memory)
    parts = parts_without_memory(method, sites, heads)
    expected = tensors_of(parts)
    translation = translation_of(type(method))
    stored = all_stored(translation, method, sites, heads, expected, theirs=theirs)
    copies = check_shapes(opened, stored, expected, translation)
    if opened.note is not None:
        check_agreement(opened, method, sites, heads, theirs=theirs)
    if with_base:
        check_base(opened, [*heads, *sites] if method.name == "head" else heads)
    raw = {entry.key: opened.keys[canonical(entry.key)] for entry in stored}
    read = read_checked(opened, raw.values())
    check_copies(opened, copies)
    method = with_tensors(method, sites, raw, lambda key: read[raw[key]])
    tensors = {}
    for entry in stored:
        if entry.derived:
            continue
        for (site, part), value in zip(entry.holds, entry.unpack(read[raw[entry.key]]), strict=True):
            tensors[site, part] = value.to(expected[site][part].dtype).contiguous()
    whole = method is built and all(
        is_all_of(part, {name for name in expected[site] if (site, name) in tensors}) for site, part in parts.items()
    )
    saved_as = opened.note.name if opened.note else "default"
    return Loaded(
        name=name or saved_as,
        saved_as=saved_as,
        method=method,
        resolution=Resolution(opened.modules.model, tuple(sites)),
        tensors=tensors,
        parts=parts if whole else None,
    )
