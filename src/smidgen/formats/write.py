"""Write an adapter folder."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.composition import Expression, Rows, Stack, names_in, to_data
from ..core.errors import FolderError
from ..core.files import atomic_directory
from ..core.fingerprint import fingerprint
from ..core.method import Method
from ..core.safe import checksum, write_tensors
from ..core.site import Site
from .config import config_fields, expects_more, peft_obstacle
from .layout import Modules, Stored, Tensors, clean, parts_without_memory, stored_heads, tensors_of
from .note import NOTE, Note, Place, Several, as_json
from .peft_fields import TASKS
from .translation import PeftTranslation, Translation
from .translations import translation_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = {CONFIG, WEIGHTS, NOTE}
THEIRS = {"README.md", ".gitattributes"}  # what else HF PEFT and its hub put there


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One adapter that lives in a model, as it is to be written."""

    name: str
    method: Method
    sites: tuple[Site, ...]
    heads: tuple[Site, ...]
    parts: Mapping[str, Adapter]  # by the name of their site


@dataclass(frozen=True, kw_only=True)
class About:
    """What a folder says beside the numbers.

    base_model: path or name of the base, by default what its config remembers.   task_type: HF PEFT's word for the
        task, by default what the model's class says.
    extra: kept as it is in smidgen.json and read back by `read_extra`.
    """

    base_model: str | None = None
    task_type: str | None = None
    extra: Mapping[str, Any] | None = None


def write_folder(
    folder: str | Path,
    model: nn.Module,
    adapters: Sequence[Placed],
    active: Expression,
    about: About,
    *,
    replace: bool = False,
) -> None:
    """Write adapters so that a reader finds all or nothing: one at the root, several in sub-folders by name.

    Under torch.distributed every process calls it, and the first one writes.
    replace: put it in the place of an adapter folder that is there; anything else that is there is never touched.
    Raises FolderError.
    """
    folder = Path(folder)
    files = {placed.name: _files(model, placed, active if len(adapters) == 1 else None, about) for placed in adapters}
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if folder.exists():
        _check_replaceable(folder, replace)
    size = sum(tensor.nbytes for _, _, tensors in files.values() for tensor in tensors.values())
    try:
        with atomic_directory(folder, replace=replace, needed_bytes=size + (1 << 20)) as new:
            if len(adapters) == 1:
                _write(new, *files[adapters[0].name])
                return
            names = tuple(sorted(files))
            several = Several(adapters=names, composition=_composition(active, names), extra=dict(about.extra or {}))
            (new / NOTE).write_bytes(several.text())
            for name in names:
                (new / name).mkdir()
                _write(new / name, *files[name])
    except OSError as error:
        raise FolderError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write(folder: Path, config: bytes, note: bytes, tensors: Mapping[str, Tensor]) -> None:
    (folder / CONFIG).write_bytes(config)
    (folder / NOTE).write_bytes(note)
    write_tensors(folder / WEIGHTS, tensors)


def _files(
    model: nn.Module, placed: Placed, active: Expression, about: About
) -> tuple[bytes, bytes, dict[str, Tensor]]:
    """adapter_config.json, smidgen.json and the tensors of one adapter."""
    held = {site: {k: _whole(t) for k, t in named.items()} for site, named in tensors_of(placed.parts).items()}
    method, own = placed.method.at_rest({site: held[site.name] for site in placed.sites})
    held |= {site.name: dict(named) for site, named in own.items()}
    placed = dataclasses.replace(placed, method=method)
    modules, translation = Modules(model), translation_of(type(method))
    name_of_base = about.base_model or getattr(getattr(model, "config", None), "name_or_path", None) or None
    task = about.task_type or next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
    pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if task is None and pairs and hasattr(model, "lm_head"):
        task = "SEQ_2_SEQ_LM"
    task_for_peft = None if expects_more(modules, placed.heads, task) else task
    obstacle = peft_obstacle(modules, placed.method, placed.sites, placed.heads, task_for_peft)
    theirs = isinstance(translation, PeftTranslation) and obstacle is None
    _check_readable(placed, held)
    stored = all_stored(translation, method, placed.sites, placed.heads, held, theirs=theirs)
    tensors = _packed(placed.name, stored, held)
    config = config_fields(modules, method, placed.sites, placed.heads, theirs=theirs)
    config["base_model_name_or_path"] = name_of_base
    config["task_type"] = task_for_peft if theirs else task
    heads = tuple(clean(site.name) for site in placed.heads)
    whole = [clean(site.name) for site in placed.sites if method.name == "head"]
    note = Note(
        name=placed.name,
        method=method.name,
        settings=translation.settings(method, placed.sites),
        sites=tuple(Place(path=clean(s.path), parameter=s.parameter, kind=kind_name(s)) for s in placed.sites),
        heads=heads,
        base={
            "class": type(model).__name__,
            "name": name_of_base,
            "fingerprint": fingerprint(model, leave_out=(*heads, *whole)),
        },
        tensors={key: checksum(tensor) for key, tensor in sorted(tensors.items())},
        composition=_composition(active, (placed.name,)),
        not_peft=obstacle,
        extra=dict(about.extra or {}),
    )
    return as_json(config), note.text(), tensors


def all_stored(
    translation: Translation,
    method: Method,
    sites: Sequence[Site],
    heads: Sequence[Site],
    tensors: Tensors,
    *,
    theirs: bool,
) -> list[Stored]:
    """What stands in the file, heads included, in HF PEFT's layout or in ours."""
    if theirs:
        assert isinstance(translation, PeftTranslation)
        stored = translation.stored_peft(method, sites, tensors)
        wrapped = frozenset(clean(site.path) for site in sites)
        return [*stored, *stored_heads(heads, tensors, translation.prefix, wrapped)]
    return [*translation.stored(method, sites, tensors), *stored_heads(heads, tensors)]


def _packed(name: str, stored: Sequence[Stored], held: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for entry in stored:
        tensor = entry.pack([held[site][tensor_name] for site, tensor_name in entry.holds])
        if entry.key in tensors:
            raise FolderError(f'"{name}" has two tensors that would both be {entry.key}; nothing was written')
        tensors[entry.key] = tensor.detach()
    bad = [key for key, tensor in tensors.items() if not finite(tensor)]
    if bad:
        raise FolderError(
            f'"{name}" holds NaN or infinity in {len(bad)} of {len(tensors)} tensors, so nothing was written: '
            f"{', '.join(bad[:5])}. Go back to the last good checkpoint"
        )
    return tensors


def kind_name(site: Site) -> str | None:
    """The name of the site's layer kind, if it has one."""
    return site.kind.name if site.kind else None


def finite(tensor: Tensor) -> bool:
    """True if all numbers are.  A sum is inf or NaN if one of them is; only then is each looked at."""
    if not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _whole(tensor: Tensor) -> Tensor:
    """Under FSDP2 every tensor is gathered on its own: they are small."""
    gather = getattr(tensor, "full_tensor", None)
    return cast(Tensor, gather()) if gather else tensor


def _check_readable(placed: Placed, held: Mapping[str, Mapping[str, Tensor]]) -> None:
    """What is read back has the shapes that the settings say; so what is written must have them."""
    expected = tensors_of(parts_without_memory(placed.method, placed.sites, placed.heads))
    for site, named in expected.items():
        for name, tensor in named.items():
            if name not in held[site] or held[site][name].shape != tensor.shape:
                have = tuple(held[site][name].shape) if name in held[site] else "not there"
                raise FolderError(
                    f"{site} {name} is {have}, by the settings of {placed.method.name} {tuple(tensor.shape)}"
                )


def _composition(active: Expression, names: Sequence[str]) -> Any:
    """The active composition as data if these adapters are all it needs; rows are of one batch and are not kept."""

    parts = active.parts if isinstance(active, Stack) else (active,)
    kept = set(names_in(active)) <= set(names) and not any(isinstance(part, Rows) for part in parts)
    return to_data(active) if kept else None


def _check_replaceable(folder: Path, replace: bool) -> None:
    """Raise FolderError unless nothing is there, or adapters only and leave to replace them."""
    if not folder.is_dir():
        raise FolderError(f"{folder} is a file; an adapter folder is a folder")
    with os.scandir(folder) as entries:
        there = sorted(entries, key=lambda entry: entry.name)
    if not there:
        return
    others = [e.name for e in there if e.name not in OURS | THEIRS and not (e.is_dir() and Path(e, CONFIG).is_file())]
    if others:
        raise FolderError(
            f"{folder} holds other things than adapters ({', '.join(others[:5])}); choose a folder of its own"
        )
    if not replace:
        raise FolderError(f"{folder} holds an adapter already. Choose another folder, or save(..., replace=True)")
