"""Read the folders of AdapterHub's package `adapters`: adapter_config.json, and pytorch_adapter.bin or
adapter.safetensors.

    {"name": "style", "model_type": "bert", "config": {"architecture": "lora", "r": 8, ...}, ...}

    bert.encoder.layer.0.output.adapters.style.adapter_down.0.weight          <owner>.<kind>.<name>.<tensor>

What each architecture's tensors are to us stands in adapterhub_methods.py.  An adapter there can be several here: of a
"union" every part, and the invertible adapter of a bottleneck.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.blocks import blocks
from ..core.errors import FolderError
from ..core.method import Method
from ..core.safe import read_json, read_tensors
from .imported import Imported
from .layout import Modules

_SAFE, _PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
KINDS = ("adapters", "invertible_adapters", "loras", "refts", "prefix_tunings", "shared_parameters", "prompt_tunings")
Named = dict[tuple[str, str], Tensor]  # (site name, tensor name) -> value
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
}
# whose residual is added before the norm that follows a feed-forward, and whose norm comes before it
POST_NORM = ("bert", "roberta", "xlm-roberta", "electra")
PRE_NORM = ("llama", "mistral", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one adapter of theirs holds.

    undone: its invertible adapter is undone before the output layer.  The package `adapters` does so in heads of its
        own alone (classes ...AdapterModel), adapter-transformers before it did in all.
    tensors: kind -> owner -> name -> tensor.
    """

    modules: Modules
    family: str
    undone: bool
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Mapping[str, Tensor]]]

    def of(self, kind: str) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors of a kind by their owner."""
        return self.tensors.get(kind, {})

    def path(self, owner: str) -> str:
        """Where a module of theirs is in this model, which may have a head that theirs had not, or none."""
        parts = owner.split(".")
        for start in range(len(parts)):
            ending = self.modules.ending({".".join(parts[start:])})
            if len(ending) == 1:
                return ending.pop()
        raise FolderError(f"does not fit this model: it has no {owner[:200]}")

    def block(self, owner: str) -> tuple[str, str]:
        """The block that an owner lies in, and the rest of its path: ("encoder.layer.0", "attention.output")."""
        found = re.fullmatch(r"(.*?(?:^|\.)\d+)\.(.+)", owner)
        path = self.path(found[1]) if found else ""
        if found is None or path not in blocks(self.modules.model):
            raise FolderError(f"{owner[:200]} is in no block that is recognised in this model")
        return path, found[2]

    def require(self, allowed: Mapping[str, Any]) -> None:
        """Raise FolderError naming all settings that are other than these, and so cannot be followed."""
        bad = {name: self.config[name] for name, value in allowed.items() if self.config.get(name, value) != value}
        if bad:
            shown = ", ".join(f"{name} = {value!r:.60}" for name, value in bad.items())
            raise FolderError(f"adapter_config.json asks for what cannot be done here: {shown}")


def imported(name: str, saved: Saved, method: Method, tensors: Named) -> Imported:
    """What a method and its tensors by (site name, tensor name) come to."""
    sites = method.resolve(saved.modules.model).sites
    return Imported(name=name, method=method, sites=sites, tensors=tensors)


def activation(saved: Saved) -> Any:
    """Our name of their non_linearity."""
    theirs = str(saved.config.get("non_linearity")).lower()
    if theirs not in _ACTIVATIONS:
        raise FolderError(f"non_linearity is {theirs[:80]!a}; read are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[theirs]


def read(folder: Path, modules: Modules) -> list[Imported]:
    """The adapters in the folder.  Raises FolderError."""
    from .adapterhub_methods import READERS  # here: it imports this file
    from .pickled import read_pickled  # and only foreign folders need these

    outer = read_json(folder / "adapter_config.json")
    name, config, family = outer.get("name"), outer.get("config"), str(outer.get("model_type"))
    if not isinstance(name, str) or not name or not isinstance(config, dict):
        raise FolderError("adapter_config.json has no name and config, as AdapterHub writes them")
    if family not in POST_NORM + PRE_NORM:
        raise FolderError(f"is for {family[:80]!a}; read are those for {', '.join(POST_NORM + PRE_NORM)}")
    own = getattr(getattr(modules.model, "config", None), "model_type", family)
    if own != family:
        raise FolderError(f"is for {family}, this model is {own}")
    path = folder / _SAFE
    tensors = _by_kind(name, read_tensors(path) if path.is_file() else read_pickled(folder / _PICKLED))
    of_package, of_class = str(outer.get("version", "")), str(outer.get("model_class", ""))
    undone = not of_package.startswith("adapters.") or of_class.endswith("AdapterModel")
    found: list[Imported] = []
    for part in config.get("configs", []) if config.get("architecture") == "union" else [config]:
        architecture = part.get("architecture") if isinstance(part, dict) else part
        if architecture not in READERS:
            known = ", ".join(str(key) for key in READERS if key)
            raise FolderError(f"its architecture is {str(architecture)[:80]!a}; read are bottlenecks (none), {known}")
        saved = Saved(modules=modules, family=family, undone=undone, config=part, tensors=tensors)
        found += READERS[architecture](name, saved)
    return [each if each is found[0] else replace(each, part=each.method.name) for each in found]


def _by_kind(name: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    own = re.compile(rf"(?:(.+)\.)?({'|'.join(KINDS)})\.{re.escape(name)}\.(.+)")
    strange = [key for key in tensors if own.fullmatch(key) is None]
    if strange:
        raise FolderError(f"{len(strange)} of {len(tensors)} tensors have no place: {', '.join(strange[:5])[:400]}")
    for key, tensor in tensors.items():
        match = own.fullmatch(key)
        assert match is not None
        owner, kind, end = match.groups()
        if ".pool" not in f".{owner}":  # every layer has all prefixes a second time
            found.setdefault(kind, {}).setdefault(owner or "", {})[end] = tensor
    return found
