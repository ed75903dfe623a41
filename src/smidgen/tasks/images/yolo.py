"""YOLO models of ultralytics, from one file: .pt as ultralytics writes it, or .safetensors.

    architecture    what the YAML of a model holds: nc, backbone, head, scales ...
    names           of its classes, in their order
    tensors         its state dict

A .pt of ultralytics is a pickle of the whole model, which holds all three; its program is read and not run
(formats/pickled.py).  A .safetensors has the first two as JSON in its metadata, "yaml" and "names"; where it has none,
and where a .pt is a mere state dict, they stand in a .yaml of its name beside it, with `names`.

ultralytics (AGPL-3.0) is imported when a model is built, and evaluates parts of an architecture: what is more than
layers of ultralytics and torch with plain settings is refused before.
"""

import copy
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ...core.errors import FolderError, MissingDependency, ModelError, reason
from ...core.safe import read_header, read_tensors, write_tensors
from ...formats.pickled import Described, Record, read_recorded

_CONVERT = """Where you trust it, convert it once:
    import json
    from safetensors.torch import save_file
    from ultralytics import YOLO
    model = YOLO("FILE.pt").model.float()
    said = {"yaml": json.dumps(model.yaml), "names": json.dumps(model.names)}
    save_file(model.state_dict(), "FILE.safetensors", said)"""
_PARTS = 1 << 17  # modules, or values of an architecture: more has no model, but a file that refers to itself
_DEPTH = 64  # of modules in modules
_VALUE = r"(\w+ *= *)?(True|False|None|-?\d+(\.\d*)?(e-?\d+)?)"
_ACTIVATION = re.compile(rf"(torch\.)?nn\.(?P<name>[A-Z]\w*)\(({_VALUE}( *, *{_VALUE})*)?\)")
_QUIET = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A YOLO as its file has it, nothing of it built.   tensors: floating ones in fp32."""

    architecture: dict[str, Any]
    names: list[str]
    tensors: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Write it as .safetensors, in the form that `read` reads."""
        write_tensors(
            path, self.tensors, {"yaml": json.dumps(self.architecture), "names": json.dumps(self.names), "format": "pt"}
        )


def load(path: str | Path) -> nn.Module:
    """The DetectionModel in a file, with its weights, the names of its classes, and the settings that its loss reads.

    Raises ModelError for what is no whole YOLO, MissingDependency without ultralytics.
    """
    path = Path(path).expanduser()
    made = read(path)
    model = build(made.architecture, made.names, str(path))
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in made.tensors.items()}
    if wrong := sorted(name for name in needed | found if needed.get(name) != found.get(name)):
        lines = [f"{name} is {found.get(name, 'missing')}, needed: {needed.get(name, 'none')}" for name in wrong[:3]]
        raise ModelError(
            f"{path} does not fit the architecture it names: {len(wrong)} of {len(needed)} tensors: {'; '.join(lines)}"
            f"{' ...' if len(wrong) > 3 else ''}"
        )
    model.load_state_dict(made.tensors)
    return model


def read(path: str | Path) -> Checkpoint:
    """What a .pt or .safetensors of a YOLO holds; no code of it is run.  Raises ModelError."""
    path = Path(path).expanduser()
    try:
        return _read(path)
    except FolderError as error:
        text = str(error).rstrip(".")
        raise ModelError(f"{text}. {_CONVERT}" if path.suffix == ".pt" else text) from error
    except ModelError as error:
        raise ModelError(f"{path} {error}") from error


def build(architecture: Mapping[str, Any], names: Sequence[str], name: str = "the YOLO") -> nn.Module:
    """A DetectionModel with fresh weights.   name: what to call it in errors.  Raises ModelError, MissingDependency."""
    tasks, settings = _ultralytics(name)
    _refuse_what_is_no_layer(architecture, tasks, name)
    channels = architecture.get("channels", architecture.get("ch", 3))
    if channels != 3:
        raise ModelError(f"{name} sees {channels} channels; images are read with 3")
    if architecture.get("nc") != len(names):
        raise ModelError(f"{name} has {len(names)} names for {architecture.get('nc')} classes (nc)")
    try:
        model = tasks.DetectionModel(copy.deepcopy(dict(architecture)), verbose=False)
    except Exception as error:  # whatever a library makes of an architecture that a stranger wrote
        raise ModelError(
            f"{name} cannot be built by ultralytics {importlib.metadata.version('ultralytics')}: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    model.names, model.args = dict(enumerate(names)), settings
    return cast(nn.Module, model)


# -- files: what is wrong is said as it follows the name of the file -------------------------------------------------
def _read(path: Path) -> Checkpoint:
    if path.suffix == ".pt":
        tensors, (architecture, names) = read_recorded(path, _choose)
    else:
        header = read_header(path)
        architecture, names = (_json(header.metadata, key) for key in ("yaml", "names"))
        tensors = read_tensors(path, header)
    if architecture is None:
        architecture = _beside(path)
        names = architecture.pop("names", None)
    if not isinstance(architecture, dict):
        raise ModelError("has an architecture that is no mapping, as the YAML of a YOLO is one")
    return Checkpoint(
        architecture=_plain(architecture),
        names=_names(names),
        tensors={name: t.float() if t.is_floating_point() else t for name, t in tensors.items()},
    )


def _choose(value: Any) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The tensors of a pickled model, its architecture and names; of a state dict, its tensors."""
    held = value if isinstance(value, dict) else {}
    if held and all(isinstance(tensor, Described) for tensor in held.values()):
        return held, (None, None)
    model = next((held[key] for key in ("ema", "model") if held.get(key) is not None), value)  # ema first, as they do
    if not isinstance(model, Record) or not isinstance(model.attributes.get("yaml"), dict):
        raise ModelError(
            "holds neither a model of ultralytics with its yaml nor a state dict; a YOLO of another project is not read"
        )
    return _state(model), (model.attributes["yaml"], model.attributes.get("names"))


def _state(model: Record) -> dict[str, Any]:
    """The state dict that a pickled module would have."""
    state: dict[str, Any] = {}
    waiting, seen = [("", model, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if seen > _PARTS or depth > _DEPTH:
            raise ModelError("holds a model whose modules refer to each other without end")
        unsaved = module.attributes.get("_non_persistent_buffers_set")
        left_out = unsaved.arguments[0] if isinstance(unsaved, Record) and unsaved.arguments else []
        for kind in ("_parameters", "_buffers"):
            own = module.attributes.get(kind) or {}
            state |= {f"{prefix}{name}": t for name, t in own.items() if t is not None and name not in left_out}
        below = module.attributes.get("_modules") or {}
        waiting += [(f"{prefix}{name}.", each, depth + 1) for name, each in below.items() if isinstance(each, Record)]
    return state


def _json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except (ValueError, RecursionError) as error:
        raise ModelError(f'has a "{key}" in its metadata that is no JSON: {reason(error)}') from error


def _beside(path: Path) -> dict[str, Any]:
    """What the .yaml of the file's name says, with the size that the name says, as ultralytics takes it from there."""
    file = path.with_suffix(".yaml")
    if not file.is_file():
        raise ModelError(
            'does not say which YOLO it is: it has no "yaml" and "names" in its metadata, and there is no '
            f"{file.name} beside it with the model's YAML and `names`. Give the .pt of ultralytics itself, which says "
            f"it all. {_CONVERT}"
        )
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency(f'PyYAML is needed to read {file}: pip install "smidgen[yolo]"') from error
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        raise ModelError(f"has a {file.name} beside it that cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict):
        raise ModelError(f"has a {file.name} beside it that is no YAML of a model, with nc, backbone and head")
    size = re.search(r"yolo(?:e-)?v?\d+([nslmx])", path.stem)
    return ({"scale": size[1]} if size and "scales" in said else {}) | said


def _plain(value: Any) -> Any:
    """A copy of numbers, texts, lists and mappings, tuples as lists.  Raises ModelError for anything else."""
    left = _PARTS

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEPTH:
            raise ModelError("has an architecture without end")
        if isinstance(value, dict):
            return {str(key): copied(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple) and not isinstance(value, Described):
            return [copied(item, depth + 1) for item in value]
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise ModelError(f"has an architecture with a {type(value).__name__} in it; it is numbers, texts and lists")

    return copied(value, 0)


def _names(said: Any) -> list[str]:
    """Names of classes as a list, from a list or a mapping of numbers."""
    if isinstance(said, dict):
        by_number = {str(key): name for key, name in said.items()}
        said = [by_number.get(str(i)) for i in range(len(said))]
    if not isinstance(said, list) or not said or not all(type(name) is str for name in said):
        raise ModelError("does not say the names of its classes: `names` is to be a list of texts")
    return said


# -- ultralytics ----------------------------------------------------------------------------------------------------
def _refuse_what_is_no_layer(architecture: Mapping[str, Any], tasks: Any, name: str) -> None:
    """ultralytics looks up each layer by its name and calls it, and evaluates the activation."""
    parts = [architecture.get(part) for part in ("backbone", "head")]
    layers = [layer for part in parts if isinstance(part, list) for layer in part]
    if not layers:
        raise ModelError(f"{name} has an architecture without backbone and head, as the YAML of a YOLO has them")
    if not all(isinstance(layer, list) and len(layer) == 4 and type(layer[2]) is str for layer in layers):
        raise ModelError(f"{name} has a layer that is no list of from, repeats, module and arguments")
    unknown = sorted({layer[2] for layer in layers if not _is_layer(layer[2], tasks)})
    if unknown:
        version = importlib.metadata.version("ultralytics")
        raise ModelError(
            f"{name} names modules that are no plain layers of ultralytics {version}: {', '.join(unknown)[:200]}"
        )
    activation = architecture.get("activation")
    if activation:
        match = _ACTIVATION.fullmatch(activation) if type(activation) is str else None
        if match is None or not _is_layer(f"nn.{match['name']}", tasks):
            raise ModelError(f"{name} has the activation {str(activation)[:80]!r}; it is to be such as nn.SiLU()")


def _is_layer(word: str, tasks: Any) -> bool:
    """True for a class of ultralytics' or torch's layers; TorchVision, which fetches weights, is none here."""
    found = getattr(nn, word[3:], None) if word.startswith("nn.") else getattr(tasks, word, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or word == "TorchVision":
        return False
    return found.__module__.startswith(("ultralytics.nn.modules.", "torch.nn.modules."))


def _ultralytics(name: str) -> tuple[Any, Any]:
    """Its module that builds models, and its default settings.  Raises MissingDependency."""
    try:
        with _unattended():
            return import_module("ultralytics.nn.tasks"), import_module("ultralytics.cfg").DEFAULT_CFG
    except ImportError as error:
        raise MissingDependency(
            f'ultralytics is needed to build {name}: pip install "smidgen[yolo]". Its licence is AGPL-3.0 ({error})'
        ) from error


@contextmanager
def _unattended() -> Iterator[None]:
    """Import ultralytics without its installing packages, asking the network or printing.

    It also asks for torchvision's version and needs torchvision for nothing that is done here: it is told one where
    none is installed.  What was set before stays, and what is changed is put back.
    """
    if "ultralytics" in sys.modules:
        yield
        return
    added = {key: value for key, value in _QUIET.items() if key not in os.environ}
    version = importlib.metadata.version
    without = not any(True for _ in importlib.metadata.distributions(name="torchvision"))

    def told(distribution_name: str) -> str:
        return "0.0.0" if without and distribution_name == "torchvision" else version(distribution_name)

    os.environ.update(added)
    importlib.metadata.version = told
    try:
        yield
    finally:
        importlib.metadata.version = version
        for key in added:
            os.environ.pop(key, None)
