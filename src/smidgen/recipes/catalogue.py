"""What each method is and where it can act, asked of the method itself: `smidgen methods` and the pages of the docs.

Nothing here is typed in by hand: a method is tried on one layer of every kind, on the meta device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..core.adapter import Adapter
from ..core.errors import SmidgenError
from ..core.method import Method, methods
from ..core.site import Site
from ..core.targets import Targets

_WIDE, _NARROW = 512, 256  # every default block size divides them
# what a method has to be told where its defaults wait for data or have nothing to act on
_NEEDED: dict[str, dict[str, Any]] = {
    "selective": {"by": "last"},
    "trainable_tokens": {"tokens": (0,)},
    "cpt": {"token_ids": (0,)},
}


@dataclass(frozen=True)
class Facts:
    """One method.   layers: kinds of layer it acts on, of those that it can be merged into: `merges`.

    elsewhere: it acts on whole blocks, attention or the model.   hf: its peft_type, or None where HF PEFT has none.
    """

    name: str
    formula: str
    paper: str
    layers: tuple[str, ...]
    merges: tuple[str, ...]
    elsewhere: bool
    hf: str | None


def catalogue() -> list[Facts]:
    """All methods by name."""
    return [facts(method) for method in methods().values()]


def facts(method: type[Method]) -> Facts:
    """What one method says of itself."""
    built = {name: adapter for name, site in _places() if (adapter := _tried(method, site)) is not None}
    return Facts(
        name=method.name,
        formula=method.summary,
        paper=method.paper,
        layers=tuple(built),
        merges=tuple(name for name, adapter in built.items() if _merges(adapter)),
        elsewhere=not built,
        hf=method.disk.peft_type if method.disk.foreign else None,
    )


def layers_text(facts: Facts) -> str:
    """Where a method acts, in few words."""
    if facts.elsewhere:
        return "blocks, model"
    found = set(facts.layers)
    words = [word for word, parts in _FAMILIES.items() if parts <= found]
    words += [f"some {word}" for word, parts in _FAMILIES.items() if not parts <= found and parts & found]
    return ", ".join(words)


def merges_text(facts: Facts) -> str:
    """Whether it becomes part of the weights."""
    if set(facts.merges) == set(facts.layers):
        return "yes" if facts.merges else "no"
    return "not all" if facts.merges else "no"


def _tried(method: type[Method], site: Site) -> Adapter | None:
    """The adapter that the method makes of this place of a model, if it does."""
    try:
        model = nn.ModuleDict({site.path: site.layer})
        made = method(targets=Targets.at([site]), **_NEEDED.get(method.name, {})).fitted(model)
        sites = made.resolve(model).sites
        return made.build(sites[0]) if [found.path for found in sites] == [site.path] else None
    except (SmidgenError, NotImplementedError):
        return None


def _merges(adapter: Adapter) -> bool:
    """True if it says how the weight changes."""
    return adapter.mergeable and type(adapter).merged is not Adapter.merged


def _places() -> Iterator[tuple[str, Site]]:
    """One site of every kind."""
    with torch.device("meta"):
        for name, make in _LAYERS.items():
            layer = make()
            if layer is not None:
                yield name, Site.at("layer", layer)
        attention, recurrent, experts = nn.MultiheadAttention(_NARROW, 4), nn.LSTM(_NARROW, _WIDE), nn.Module()
        experts.weight = nn.Parameter(torch.empty(4, _WIDE, _NARROW))
    yield "packed attention", Site.at("attention", attention, "in_proj_weight")
    yield "LSTM, GRU, RNN", Site.at("recurrent", recurrent, "weight_hh_l0")
    yield "stacked experts", Site.at("experts", experts, "weight")


def _transposed() -> nn.Module | None:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return None
    layer: nn.Module = cast(Any, Conv1D)(_WIDE, _NARROW)
    return layer


_FAMILIES = {
    "linear": {"Linear", "transposed Conv1D"},
    "conv": {"Conv1d", "Conv2d", "Conv3d", "grouped Conv2d"},
    "transposed conv": {"ConvTranspose2d"},
    "embedding": {"Embedding"},
    "norm": {"LayerNorm", "RMSNorm", "BatchNorm2d", "GroupNorm"},
    "packed attention": {"packed attention"},
    "recurrent": {"LSTM, GRU, RNN"},
    "experts": {"stacked experts"},
}
_LAYERS: dict[str, Callable[[], Any]] = {
    "Linear": lambda: nn.Linear(_NARROW, _WIDE),
    "transposed Conv1D": _transposed,
    "Conv1d": lambda: nn.Conv1d(_NARROW, _WIDE, 3),
    "Conv2d": lambda: nn.Conv2d(_NARROW, _WIDE, 3),
    "Conv3d": lambda: nn.Conv3d(_NARROW, _WIDE, 3),
    "grouped Conv2d": lambda: nn.Conv2d(_NARROW, _WIDE, 3, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(_NARROW, _WIDE, 3),
    "Embedding": lambda: nn.Embedding(_WIDE, _NARROW),
    "LayerNorm": lambda: nn.LayerNorm(_NARROW),
    "RMSNorm": lambda: nn.RMSNorm(_NARROW),
    "BatchNorm2d": lambda: nn.BatchNorm2d(_NARROW),
    "GroupNorm": lambda: nn.GroupNorm(4, _NARROW),
}
