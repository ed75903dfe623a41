"""Method: what to learn and with which settings; a frozen value that can build an adapter for a site.

`@method("lora")` enters a method in the table; another package does so through the entry point group `smidgen.methods`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .disk_names import DiskNames
from .errors import ConfigError, nearest
from .layers import LinearKind
from .site import Site
from .targets import Resolution, Targets, body_layers


class Shared(nn.Module):
    """Parameters that all adapters of one name use together."""

    def prepare(self) -> None:
        """`Adapter.prepare`, before that of the adapters."""

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise all parameters, with random numbers from `generator` alone.  Without any nothing is to do."""
        if any(True for _ in self.parameters(recurse=False)):
            raise NotImplementedError


Builder = TypeVar("Builder", bound="type[Method]")
_METHODS: dict[str, "type[Method]"] = {}
_OURS = "smidgen.methods"  # each of its files is a method, by the name of the file


@dataclass(frozen=True, kw_only=True)
class Method:
    """What to learn.  Subclasses add settings, `check` and `build`, and nothing else is needed.

    targets: which places; "auto" is the method's own choice for the model.
    heads: modules trained whole and carried along with the adapter, by path or its end: a new task's classifier.
    """

    targets: Targets = field(default_factory=Targets.auto)
    heads: tuple[str, ...] = ()

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for `smidgen methods`: the formula
    paper: ClassVar[str]  # authors, year, arXiv number
    disk: ClassVar[DiskNames]
    reads_weight: ClassVar[bool] = False  # what it adds depends on the weight's value, which has to be plain
    on_stacks: ClassVar[bool] = True  # it acts on stacked experts too
    on_linear_calls: ClassVar[bool] = False  # on these alone: no convolutions, embeddings or parameters
    faster: ClassVar[tuple[str, ...]] = ()  # an adapter's tensors that LoRA+ lets learn faster: see lora_plus.py

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", Targets.of(self.targets))
        heads = (self.heads,) if isinstance(self.heads, str) else tuple(self.heads)
        object.__setattr__(self, "heads", heads)
        self.check()

    def check(self) -> None:
        """Raise ConfigError if the settings cannot be."""

    def accepts(self, site: Site) -> str | None:
        """None if the method can act at this site, else the reason why not."""
        if site.kind is None:
            return f"{type(site.layer).__name__} has no linear map; {self.name} acts on layers such as Linear"
        if not site.kind.low_rank:
            return f"{type(site.layer).__name__} is a diagonal map; {self.name} needs a matrix"
        if self.on_linear_calls and (site.parameter is not None or not isinstance(site.kind, LinearKind)):
            what = "parameters" if site.parameter is not None else f"layers of kind {site.kind.name}"
            return f"{type(self).__name__} acts on calls of linear layers, not on {what}"
        if (self.reads_weight or self.by_weight(site)) and not site.storage.readable:
            return f"its weight is held as {site.storage.name}; {type(self).__name__} has to read it"
        if site.linear.stack > 1 and not self.on_stacks:
            return f"it is a stack of {site.linear.stack} matrices; {type(self).__name__} acts on single ones"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """Paths that "auto" means for this method in this model, and what it leaves out with the reason."""
        return body_layers(model)

    def fitted(self, model: nn.Module) -> "Method":
        """The method with what depends on the model filled in, before its sites are found.  Most have nothing."""
        return self

    def by_weight(self, site: Site) -> bool:
        """True if at this layer the method acts on the weight's value by `merged`, and not on the call by `forward`."""
        return False

    def resolve(self, model: nn.Module) -> Resolution:
        """The sites of this method in this model.  Raises TargetError if there are none."""
        found = self._resolve(model)
        return Resolution(found.model, tuple(map(self.placed, found.sites)), found.passed_over)

    def placed(self, site: Site) -> Site:
        """The site itself, or its layer's weight where the method acts `by_weight`."""
        by_weight = site.parameter is None and site.kind is not None and self.by_weight(site)
        return Site.at(site.path, site.layer, "weight") if by_weight else site

    def _resolve(self, model: nn.Module) -> Resolution:
        if not self.targets.is_auto:
            return self.targets.resolve(model, self.accepts)
        paths, left_out = self.auto(model)
        heads = [path for path in paths if self.is_in_heads(model, path)]
        found = Targets.exactly(set(paths) - set(heads)).resolve(model, self.accepts)
        left_out |= dict.fromkeys(heads, "trained whole, as a head")
        return Resolution(model, found.sites, (*found.passed_over, *left_out.items()))

    def is_in_heads(self, model: nn.Module, path: str) -> bool:
        """True if the module at `path` is, or lies in, one that `heads` trains whole."""
        heads, parts = Targets(*self.heads) if self.heads else None, path.split(".")
        above = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return heads is not None and any(heads.matches(name, model.get_submodule(name)) for name in above)

    def build(self, site: Site) -> Adapter:
        """The adapter for one site, its parameters uninitialised; `Adapter.reset` initialises them."""
        raise NotImplementedError

    def shared(self, sites: tuple[Site, ...]) -> "Shared | None":
        """Parameters that all sites use together, or None.

        Every adapter finds them as `self.shared`; the first one holds them.
        """
        return None

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A scalar whose gradient joins that of the loss before each optimiser step, or None.  Most have none."""
        return None

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        """What changes while training, as a rank budget does: called after each optimiser step, gradients still there.

        step: steps done, this one included, of `steps`.   See `AdapterSet.follow`.
        """

    def at_rest(
        self, tensors: Mapping[Site, Mapping[str, Tensor]]
    ) -> "tuple[Method, Mapping[Site, Mapping[str, Tensor]]]":
        """What is written for an adapter that training leaves larger or otherwise than it has to stay: no more than it
        needs to do the same.  Most are written as they are.

        tensors: of each site by the adapter's own names.
        """
        return self, tensors

    @property
    def told_by_tensors(self) -> bool:
        """True if a saved adapter's tensors say more of the method than its settings: `with_tensors`."""
        return type(self).with_tensors is not Method.with_tensors

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> "Method":
        """The method as a saved adapter has it, for one whose tensors say more than its settings.

        tensors: of each site by the adapter's own names; on the meta device, at first, they tell sizes and no more.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """The method's own settings, without targets and heads."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("targets", "heads")}


def method(name: str) -> Callable[[Builder], Builder]:
    """Enter a method in the table under `name`."""

    def enter(cls: Builder) -> Builder:
        cls.name = name
        _METHODS[name] = cls
        return cls

    return enter


def methods() -> dict[str, type[Method]]:
    """All methods by name, those of other packages included (entry point group `smidgen.methods`)."""
    from importlib.metadata import entry_points  # here: only listing needs it

    for found in iter_modules(import_module(_OURS).__path__):
        import_module(f"{_OURS}.{found.name}")
    for entry in entry_points(group="smidgen.methods"):
        if entry.name not in _METHODS:
            _METHODS[entry.name] = cast("type[Method]", entry.load())
    return dict(sorted(_METHODS.items()))


def method_named(name: str) -> type[Method]:
    """The method of this name.  Raises ConfigError naming the nearest."""
    if name not in _METHODS and name.isidentifier() and find_spec(f"{_OURS}.{name}"):
        import_module(f"{_OURS}.{name}")
    known = _METHODS if name in _METHODS else methods()
    if name not in known:
        near = nearest(name, known)
        mean = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(f'there is no method "{name}". {mean}List all: smidgen methods')
    return known[name]
