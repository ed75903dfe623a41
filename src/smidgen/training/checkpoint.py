"""Checkpoints of a run: each is a directory that is complete or not there, and holds all that a bit-equal resume needs.

    step-00001200/
        adapter-state.safetensors   what is trained: adapter and head tensors
        optimizer.safetensors       the tensors among the rest
        state.json                  the rest: step, optimiser settings, metrics so far
        manifest.json               size and sha256 of the three

The step is position enough: learning rate, order of the data and all random numbers of a step follow from (seed, step).
What is read is compared with the manifest first, so a damaged file is found before anything is made of it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import CheckpointError, FolderError, require
from ..core.files import atomic_directory, remove_directory, sha256_file
from ..core.safe import read_json, read_tensors, write_tensors

TRAINED, OPTIMIZER, STATE, MANIFEST = (
    "adapter-state.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
VERSION = 1
_MAX_JSON_BYTES = 256 << 20  # ours, and its sha256 is known by then


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a bit-equal resume needs. Plain data and tensors only."""

    step: int
    tensors: dict[str, Tensor]  # adapters and heads, fp32
    optimizer: dict[str, Any]  # optimizer.state_dict()
    history: dict[str, Any]  # metrics so far, and the best tensors if these are not
    fingerprint: str  # of recipe, data and model: what must be equal for a resume to make sense


def save(folder: str | Path, state: State, *, keep: int = 2) -> Path:
    """Write `folder`/step-<step>, then delete all older ones but the last `keep`; returns its path.

    Raises CheckpointError if the disk is full or the state holds more than plain data; older ones are untouched then.
    """
    require(keep >= 1, f"keep is {keep}; at least the checkpoint just written is kept", CheckpointError)
    path = path_of(Path(folder), state.step)
    others: dict[str, Tensor] = {}
    rest = {name: _pack(getattr(state, name), others, name) for name in ("optimizer", "history")}
    text = _json({"version": VERSION, "step": state.step, "fingerprint": state.fingerprint, **rest})
    size = sum(tensor.nbytes for tensor in (*state.tensors.values(), *others.values())) + len(text) + (1 << 20)
    try:
        with atomic_directory(path, replace=True, needed_bytes=size) as new:
            write_tensors(new / TRAINED, state.tensors)
            write_tensors(new / OPTIMIZER, others)
            (new / STATE).write_bytes(text)
            files = {name: _describe(new / name) for name in (TRAINED, OPTIMIZER, STATE)}
            (new / MANIFEST).write_bytes(_json(_manifest(files)))
    except (OSError, FolderError) as error:
        raise CheckpointError(f"step {state.step}: the checkpoint was not written: {error}") from error
    older = [step for step in _steps(path.parent) if step <= state.step][keep:]
    try:
        for step in older:
            remove_directory(path_of(path.parent, step))
    except OSError as error:
        raise CheckpointError(f"{path} was written, but an older one could not be deleted: {error}") from error
    return path


def load(path: str | Path) -> State:
    """Read one checkpoint. Raises CheckpointError naming every damaged file."""
    path = Path(path)
    require(path.is_dir(), f"{path} is not a checkpoint; there is no such directory", CheckpointError)
    damaged = _damage(path)
    require(not damaged, f"{path} is damaged: {'; '.join(damaged)}", CheckpointError)
    try:
        text = read_json(path / STATE, max_bytes=_MAX_JSON_BYTES)
        others = read_tensors(path / OPTIMIZER)
        return State(
            step=text["step"],
            tensors=read_tensors(path / TRAINED),
            optimizer=_unpack(text["optimizer"], others),
            history=_unpack(text["history"], others),
            fingerprint=text["fingerprint"],
        )
    except (FolderError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is whole, but no checkpoint of this version: {error}") from error


def newest(folder: str | Path, *, fingerprint: str | None = None) -> tuple[Path, State, list[str]] | None:
    """The newest whole checkpoint in `folder`, with a line for each newer one that is damaged; None if there is none.

    Raises CheckpointError if all are damaged, or if the newest whole one has another `fingerprint`.
    """
    folder, damaged = Path(folder), []
    for step in _steps(folder):
        path = path_of(folder, step)
        try:
            state = load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        require(
            fingerprint in (None, state.fingerprint),
            f"{path} belongs to another run: recipe, data or model have changed since (fingerprint "
            f"{state.fingerprint}, now {fingerprint}). Undo the change, or start afresh in another folder",
            CheckpointError,
        )
        return path, state, damaged
    require(not damaged, f"no whole checkpoint in {folder}: {'; '.join(damaged)}. Start afresh", CheckpointError)
    return None


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """The steps that have a directory, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(p.name[5:]) for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _manifest(files: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of its own, so that damage to it is not taken for damage to the files."""
    return {"version": VERSION, "files": files, "sha256": hashlib.sha256(_json(files)).hexdigest()}


def _damage(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty if nothing is."""
    try:
        manifest = read_json(path / MANIFEST)
        whole = (path / MANIFEST).read_bytes() == _json(manifest)  # so that no flipped bit goes unseen here either
    except (FolderError, OSError) as error:
        return [f"{MANIFEST}: {error}"]
    files = manifest.get("files")
    if not whole or not isinstance(files, dict) or manifest != _manifest(files) | {"version": manifest.get("version")}:
        return [f"{MANIFEST}: is not as it was written"]
    if manifest["version"] != VERSION or set(files) != {TRAINED, OPTIMIZER, STATE}:
        return [f"{MANIFEST}: has version {manifest['version']!r}; this smidgen reads {VERSION}"]
    damaged = []
    for name, written in files.items():
        try:
            found = _describe(path / name)
        except OSError as error:
            damaged.append(f"{name}: {error.strerror}")
            continue
        if found != written:
            damaged.append(f"{name}: is not as it was written; it is {found}, the manifest says {written}")
    return damaged


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Nested plain data as JSON, with its tensors moved to `tensors`. What JSON lacks becomes {"$kind": ...}."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor):
        require(name not in tensors, f"{name} stands for two tensors", CheckpointError)
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        packed = [(key, _pack(item, tensors, f"{name}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(packed)
        return {"$dict": [[_pack(key, tensors, name), item] for key, item in packed]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(f"{name} is a {kind}; a checkpoint holds numbers, texts, lists, dicts and tensors")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_pack`."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$float": text}:
            return float(text)
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"$dict": items}:
            return {_unpack(key, tensors): _unpack(item, tensors) for key, item in items}
    return {key: _unpack(item, tensors) for key, item in value.items()}
