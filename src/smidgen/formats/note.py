"""`smidgen.json`: what our adapter folder knows beyond Hugging Face PEFT's two files.

A folder of one adapter:
    format          2; of 1, which is read too, the checksums are sha256
    name            the adapter's name
    method          ours, as `smidgen methods` lists it
    settings        the method's own; patterns as {site: value}
    sites           [{path, parameter or null, kind}], the places where the adapter lives, in the model's order
    heads           paths of modules trained whole
    composition     what was active if it was made of this adapter alone, or null
    base            {class, name, fingerprint} of the base model
    tensors         {key in adapter_model.safetensors: checksum of its dtype, shape and values}
    not_peft        why HF PEFT's layout could not hold this adapter, or null
    extra           whatever the caller wanted to keep with it: task, label names, ...

A folder of several:    format, adapters: names of the sub-folders, composition, extra.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.composition import Expression, from_data
from ..core.errors import FolderError, SmidgenError
from ..core.safe import read_json
from .translation import plain

FORMAT = 2
NOTE = "smidgen.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one part of an adapter lives."""

    path: str
    parameter: str | None
    kind: str | None


@dataclass(frozen=True, kw_only=True)
class Note:
    """What `smidgen.json` says of one adapter."""

    name: str
    method: str
    settings: Mapping[str, Any]
    sites: tuple[Place, ...]
    heads: tuple[str, ...]
    base: Mapping[str, Any]
    tensors: Mapping[str, str]
    composition: Any = None
    not_peft: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> bytes:
        """The bytes of the file."""
        return as_json({"format": FORMAT, **asdict(self)})


@dataclass(frozen=True, kw_only=True)
class Several:
    """What `smidgen.json` says of a folder with one sub-folder per adapter."""

    adapters: tuple[str, ...]
    composition: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> bytes:
        """The bytes of the file."""
        return as_json({"format": FORMAT, **asdict(self)})


def as_json(value: Mapping[str, Any]) -> bytes:
    """Sorted keys, two spaces: the same value gives the same bytes.  Raises FolderError for what is no JSON."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise FolderError(
            f"cannot be written as JSON: {error}. Settings and extra are numbers, texts, lists and mappings"
        ) from error


def read_note(folder: Path) -> "Note | Several | None":
    """What stands in a folder's smidgen.json, checked; None if there is none.  Raises FolderError."""
    path = folder / NOTE
    if not path.exists() and not path.is_symlink():
        return None
    data = read_json(path)
    version = data.pop("format", None)
    if version not in (1, FORMAT):
        raise FolderError(
            f"{path}: format is {str(version)[:40]!r}, this smidgen reads 1 and {FORMAT}. A newer one wrote it: upgrade"
        )
    kinds = {"adapters": list, "extra": dict} if "adapters" in data else _KINDS
    wrong = [name for name, kind in kinds.items() if not isinstance(data.get(name), kind)]
    wrong += [name for name in data if name not in kinds and name not in ("composition", "not_peft")]
    if wrong:
        raise FolderError(
            f"{path}: {', '.join(map(ascii, wrong))[:300]} is missing, misspelt or of another type than it has"
        )
    composition(data, path)
    if "adapters" in data:
        names = tuple(str(name) for name in data["adapters"])
        bad = [name for name in names if not name or name in (".", "..") or any(mark in name for mark in "/\\\0")]
        if bad or len(set(names)) < len(names) or not names:
            raise FolderError(f"{path}: adapters are not names of different sub-folders: {str(list(names))[:200]}")
        return Several(**{**data, "adapters": names})
    return Note(**{**data, "sites": tuple(_place(place, path) for place in data["sites"]), "heads": _heads(data, path)})


_KINDS = {
    "name": str,
    "method": str,
    "settings": dict,
    "sites": list,
    "heads": list,
    "base": dict,
    "tensors": dict,
    "extra": dict,
}


def composition(data: Mapping[str, Any], path: Path) -> Expression:
    """The composition that a note holds.  Raises FolderError."""
    try:
        return from_data(data.get("composition"))
    except (SmidgenError, TypeError, ValueError, RecursionError) as error:
        raise FolderError(f"{path}: composition: {str(error)[:300]}") from error


def _place(data: Any, path: Path) -> Place:
    texts = (str, type(None))
    if not (
        isinstance(data, dict)
        and data.keys() == {"path", "parameter", "kind"}
        and isinstance(data["path"], str)
        and all(isinstance(value, texts) for value in data.values())
    ):
        raise FolderError(f"{path}: sites holds {str(data)[:100]!r}, not path, parameter and kind")
    return Place(**data)


def _heads(data: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    try:
        return tuple(plain(head, "heads") for head in data["heads"])
    except FolderError as error:
        raise FolderError(f"{path}: {error}") from error
