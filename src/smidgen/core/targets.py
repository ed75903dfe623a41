"""Targets: how a user says which places in a model.  Values that combine; resolved to a list of sites before anything is attached.

Targets("*.q_proj", "*.v_proj")                      glob on the dotted path; a pattern also matches the end of a path
Targets("model.layers.{0-11}.mlp.*_proj")            {0-11} a range of numbers, {a,b} alternatives
Targets.of_type(nn.Linear) & ~Targets("lm_head")     types, and, or, not
Targets(lambda path, module: ...)                    anything
Targets("*.self_attn").parameter("in_proj_weight")   a parameter of the module as the site
Targets.auto()                                       all linear layers of the body, not the head; in a CNN the convolutions
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .adapter import Held
from .errors import TargetError, nearest
from .layers import ConvKind, EmbeddingKind, LayerKind, LinearKind, kind_of
from .site import Site

Predicate = Callable[[str, nn.Module], bool]


class Targets:
    """A set of places, said in patterns, predicates or types.  Immutable; `|`, `&` and `~` combine."""

    def __init__(self, *what: str | Predicate) -> None:
        if not what:
            raise TargetError(
                'Targets() names no place; say Targets("*.q_proj"), Targets.of_type(nn.Linear) or Targets.auto()'
            )
        self._patterns = tuple(part for part in what if isinstance(part, str))
        self._tests: tuple[Predicate, ...] = tuple(_glob(part) if isinstance(part, str) else part for part in what)
        self._parameters: tuple[str, ...] = ()
        self.is_auto = False
        self._text = ", ".join(
            f'"{part}"' if isinstance(part, str) else getattr(part, "__name__", "predicate") for part in what
        )

    @staticmethod
    def of_type(*types: type[nn.Module]) -> "Targets":
        """All modules that are instances of one of the types."""
        targets = Targets(_OfType(types))
        targets._text = " or ".join(t.__name__ for t in types)
        return targets

    @staticmethod
    def auto() -> "Targets":
        """What the method takes where nobody says: for most, every linear layer of the body but not of the head."""
        targets = Targets(_Exactly(frozenset()))
        targets.is_auto, targets._text = True, "auto"
        return targets

    @staticmethod
    def exactly(paths: Iterable[str]) -> "Targets":
        """The modules at these dotted paths and no others."""
        wanted = frozenset(paths)
        targets = Targets(_Exactly(wanted))
        targets._text = f"{len(wanted)} exact paths"
        return targets

    @staticmethod
    def of(what: "Targets | str | Sequence[str]") -> "Targets":
        """Targets from what a recipe or a keyword says: "auto", a pattern, or a list of patterns."""
        if isinstance(what, Targets):
            return what
        if what == "auto":
            return Targets.auto()
        return Targets(what) if isinstance(what, str) else Targets(*what)

    def parameter(self, *names: str) -> "Targets":
        """The named parameters of these modules as the sites, for code that reads a weight without calling forward."""
        targets = self._combined(self._tests, f"{self._text}.parameter({', '.join(names)})")
        targets._patterns, targets._parameters = self._patterns, names
        return targets

    def matches(self, path: str, module: nn.Module) -> bool:
        """True if the module at `path` is one of the places."""
        return any(test(path, module) for test in self._tests)

    def __or__(self, other: "Targets") -> "Targets":
        return self._combined((self.matches, other.matches), f"{self} | {other}")

    def __and__(self, other: "Targets") -> "Targets":
        return self._combined((_Both(self, other),), f"{self} & {other}")

    def __invert__(self) -> "Targets":
        return self._combined((_Not(self),), f"~({self})")

    def __repr__(self) -> str:
        return f"Targets({self._text})"

    def _combined(self, tests: tuple[Predicate, ...], text: str) -> "Targets":
        if self.is_auto:
            raise TargetError(
                'Targets.auto() does not combine: it depends on the model. Use Targets.of_type(nn.Linear) & ~Targets("lm_head")'
            )
        targets = Targets(*tests)
        targets._text = text
        return targets

    def resolve(self, model: nn.Module, accepts: Callable[[Site], str | None]) -> "Resolution":
        """The sites in this model, and what was passed over and why.

        accepts: a method's word on a site: None if it can act there, else the reason why not.
        Raises TargetError if a pattern matches nothing, or nothing is left, or a named place cannot be acted on.
        """
        modules = [(path, module) for path, module in _modules(model)]
        found = [(path, module) for path, module in modules if self.matches(path, module)]
        self._refuse_idle_patterns(model, modules)
        sites: list[Site] = []
        refused: list[tuple[str, str]] = []
        for path, module in found:
            for site in self._sites(model, path, module):
                reason = accepts(site)
                if reason is None:
                    sites.append(site)
                else:
                    refused.append((site.name, reason))
        if refused and (
            self._patterns or not sites
        ):  # what was named must be possible; what was swept up may be passed over
            shown = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in refused[:5])
            raise TargetError(f"{self} names {len(refused)} places that cannot be adapted so. {shown}")
        if not sites:
            raise TargetError(
                f"{self} matches none of the {len(modules)} modules of {type(model).__name__}. {_inventory(modules)}"
            )
        return Resolution(model, tuple(sites), tuple(refused))

    def _sites(self, model: nn.Module, path: str, module: nn.Module) -> list[Site]:
        if self._parameters:
            return [Site.at(path, module, name) for name in self._parameters]
        return [_called_site(model, path, module)]

    def _refuse_idle_patterns(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
        idle = [p for p in self._patterns if not any(_glob(p)(path, module) for path, module in modules)]
        if idle:
            lines = [
                f'"{p}" matches none of {len(modules)} modules of {type(model).__name__}. {_near(p, modules)}'
                for p in idle
            ]
            raise TargetError("\n".join(lines))


@dataclass(frozen=True)
class Resolution:
    """Targets found in a model: the sites, and what was matched but passed over with the reason."""

    model: nn.Module
    sites: tuple[Site, ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    def report(self) -> str:
        """Which sites, which share of the weights they hold, and what of the model was left out and why."""
        total = sum(p.numel() for p in self.model.parameters())
        covered = sum({id(p): p.numel() for site in self.sites for p in _parameters(site)}.values())
        groups = Counter(
            (re.sub(r"\.\d+(?=\.|$)", ".*", site.name) or "the model", _shape(site)) for site in self.sites
        )
        lines = [f"{len(self.sites)} sites holding {covered:,} of {total:,} parameters ({covered / max(total, 1):.1%})"]
        lines += [f"  {count:4d} x {name}  {shape}" for (name, shape), count in groups.items()]
        lines += [f"  left out {name}: {reason}" for name, reason in self.passed_over]
        taken = {site.path for site in self.sites}
        left = Counter(
            re.sub(r"\.\d+(?=\.|$)", ".*", path) + f"  {type(module).__name__}"
            for path, module in _modules(self.model)
            if path not in taken
            and any(True for _ in module.parameters(recurse=False))
            and path not in dict(self.passed_over)
        )
        lines += [f"  untouched {count:4d} x {what}" for what, count in left.items()]
        return "\n".join(lines)


def body_layers(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Paths of the layers that "auto" adapts, and the layers left out with the reason.

    All linear layers outside the head; convolutions instead where they hold most of the weights, embeddings where
    there is nothing else (recommenders).  The head is what the library says it is (`get_output_embeddings`,
    `base_model_prefix`, timm's `get_classifier`), else the last layer in the order of registration.
    """
    left_out: dict[str, str] = {}
    groups: dict[type[LayerKind], list[tuple[str, nn.Module]]] = {LinearKind: [], ConvKind: [], EmbeddingKind: []}
    head = head_modules(model)
    for path, module in _modules(model):
        kind = next((k for k in groups if isinstance(kind_of(module), k)), None)
        if kind is None:
            continue
        if any(path == h or path.startswith(h + ".") for h in head):
            left_out[path] = "part of the head"
        else:
            groups[kind].append((path, module))
    sizes = {
        kind: sum(p.numel() for _, module in found for p in module.parameters(recurse=False))
        for kind, found in groups.items()
    }
    linear_or_conv = ConvKind if sizes[ConvKind] > sizes[LinearKind] else LinearKind
    chosen = linear_or_conv if groups[linear_or_conv] else EmbeddingKind
    for kind, found in groups.items():
        if kind is not chosen:
            left_out.update({path: f"{kind.name} layer; the body of this model is {chosen.name}" for path, _ in found})
    return [path for path, _ in groups[chosen]], left_out


def head_modules(model: nn.Module) -> list[str]:
    """Dotted paths of the modules that make up the model's head; empty for a bare body."""
    names = {id(module): path for path, module in _modules(model)}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return [name for name, _ in model.named_children() if name not in (prefix, "smidgen")]
    if hasattr(model, "base_model_prefix"):  # a transformers body without a head
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [names[id(output)]] if id(output) in names else []
    if hasattr(model, "get_classifier") and id(model.get_classifier()) in names:
        return [names[id(model.get_classifier())]]
    layers = [path for path, module in _modules(model) if isinstance(kind_of(module), LinearKind | ConvKind)]
    return layers[-1:] if len(layers) > 1 else []


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths in the order of `named_modules`, the adapters that live there left out."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or type(module) is Held:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def _called_site(model: nn.Module, path: str, module: nn.Module) -> Site:
    """The site that reaches this module: its call, or its weight as a parameter of a parent that never calls it."""
    parent_path, _, name = path.rpartition(".")
    if name and isinstance(model.get_submodule(parent_path), nn.MultiheadAttention) and name == "out_proj":
        return Site.at(parent_path, model.get_submodule(parent_path), "out_proj.weight")
    return Site.at(path, module)


@dataclass(frozen=True)
class _OfType:
    types: tuple[type[nn.Module], ...]

    def __call__(self, path: str, module: nn.Module) -> bool:
        return isinstance(module, self.types)


@dataclass(frozen=True)
class _Exactly:
    paths: frozenset[str]

    def __call__(self, path: str, module: nn.Module) -> bool:
        return path in self.paths


@dataclass(frozen=True)
class _Both:
    one: "Targets"
    other: "Targets"

    def __call__(self, path: str, module: nn.Module) -> bool:
        return self.one.matches(path, module) and self.other.matches(path, module)


@dataclass(frozen=True)
class _Not:
    one: "Targets"

    def __call__(self, path: str, module: nn.Module) -> bool:
        return not self.one.matches(path, module)


@dataclass(frozen=True)
class _Matches:
    expression: re.Pattern[str]

    def __call__(self, path: str, module: nn.Module) -> bool:
        return self.expression.fullmatch(path) is not None


@functools.cache
def _glob(pattern: str) -> Predicate:
    """`*` any text, `?` one character, {0-11} numbers, {a,b} alternatives; matches a whole path or its end after a dot."""
    parts: list[str] = []
    for token in re.findall(r"\{[^{}]*\}|\*+|.", pattern):
        if token.startswith("{") and (span := re.fullmatch(r"\{(\d+)-(\d+)\}", token)):
            low, high = int(span[1]), int(span[2])
            parts.append("(?:" + "|".join(str(n) for n in range(low, high + 1)) + ")" if low <= high else "(?!)")
        elif token.startswith("{"):
            parts.append("(?:" + "|".join(re.escape(word.strip()) for word in token[1:-1].split(",")) + ")")
        else:
            parts.append(".*" if token.startswith("*") else "." if token == "?" else re.escape(token))
    return _Matches(re.compile(r"(?:.*\.)?" + "".join(parts)))


def _near(pattern: str, modules: list[tuple[str, nn.Module]]) -> str:
    ends = Counter(path.rpartition(".")[2] for path, _ in modules if path and not path.rpartition(".")[2].isdigit())
    near = nearest(pattern.rpartition(".")[2].strip("*"), ends)
    if not near:
        return _inventory(modules)
    return "Near it: " + ", ".join(f"*.{end} ({ends[end]})" for end in near) + "."


def _inventory(modules: list[tuple[str, nn.Module]]) -> str:
    ends = Counter(path.rpartition(".")[2] for path, module in modules if kind_of(module) is not None)
    return "It has: " + ", ".join(f"*.{end} ({count})" for end, count in ends.most_common(12)) + "."


def _parameters(site: Site) -> list[nn.Parameter]:
    owned = [site.stored] if site.parameter else list(site.layer.parameters(recurse=site.kind is None))
    return [p for p in owned if isinstance(p, nn.Parameter)]


def _shape(site: Site) -> str:
    return type(site.layer).__name__ if site.kind is None else f"{site.kind.name} {site.fan_in} -> {site.fan_out}"
