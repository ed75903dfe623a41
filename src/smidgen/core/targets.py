"""Targets: how a user says which places in a model.  Values that combine; resolved to a list of sites before attaching.

Targets("*.q_proj", "*.v_proj")                      glob on the dotted path; a pattern also matches the end of a path
Targets("model.layers.{0-11}.mlp.*_proj")            {0-11} a range of numbers, {a,b} alternatives
Targets.of_type(nn.Linear) & ~Targets("lm_head")     types, and, or, not
Targets(lambda path, module: ...)                    anything
Targets("*.self_attn").parameter("in_proj_weight")   a parameter of the module as the site
                                                     in recipes: "*.self_attn:in_proj_weight"
Targets.auto()                                       all linear layers of the body, not the head; a CNN's convolutions
"""

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from .adapter import HELD, Held
from .errors import TargetError, nearest
from .layers import ConvKind, EmbeddingKind, LayerKind, LinearKind, kind_of
from .quantised_linear import own_weights
from .site import Site

Predicate = Callable[[str, nn.Module], bool]
Value = TypeVar("Value")


class Targets:
    """A set of places, said in patterns, predicates or types.  Immutable; `|`, `&` and `~` combine."""

    def __init__(self, *what: str | Predicate) -> None:
        if not what:
            raise TargetError(
                'Targets() names no place; say Targets("*.q_proj"), Targets.of_type(nn.Linear) or Targets.auto()'
            )
        self._patterns = tuple(part for part in what if isinstance(part, str))  # each has to match something
        self._named = bool(self._patterns)  # what was named must be possible; what was swept up may be passed over
        self._terms = tuple(_Term(_glob(part) if isinstance(part, str) else part) for part in what)
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
    def at(sites: Iterable[Site]) -> "Targets":
        """These sites and no others."""
        sites = list(sites)
        targets = Targets.exactly(site.path for site in sites if site.parameter is None)
        for site in sites:
            if site.parameter is not None:
                targets |= Targets.exactly([site.path]).parameter(site.parameter)
        return targets

    @staticmethod
    def of(what: "Targets | str | Sequence[str]") -> "Targets":
        """Targets from what a recipe or a keyword says: "auto", a pattern, or a list of patterns.

        MODULES:PARAMETER is `Targets(MODULES).parameter(PARAMETER)`.
        """
        if isinstance(what, Targets):
            return what
        if what == "auto":
            return Targets.auto()
        patterns = [what] if isinstance(what, str) else list(what)
        whole = [pattern for pattern in patterns if not (isinstance(pattern, str) and ":" in pattern)]
        found = [Targets(*whole)] if whole or not patterns else []
        for pattern in patterns:
            if pattern not in whole:
                module, _, name = pattern.partition(":")
                found.append(Targets(module).parameter(name))
        return functools.reduce(operator.or_, found)

    def parameter(self, *names: str) -> "Targets":
        """The named parameters of these modules as the sites, for code that reads a weight without calling forward."""
        terms = tuple(_Term(term.test, names) for term in self._terms)
        return self._combined((self,), terms, f"{' and '.join(names)} of {self._text}", named=self._named)

    def matches(self, path: str, module: nn.Module) -> bool:
        """True if the module at `path` is one of the places."""
        return any(term.test(path, module) for term in self._terms)

    def __or__(self, other: "Targets") -> "Targets":
        terms = (*self._terms, *other._terms)
        return self._combined((self, other), terms, f"{self._text} | {other._text}", named=self._named or other._named)

    def __and__(self, other: "Targets") -> "Targets":
        self._refuse_parameters(other)
        return self._combined((self, other), (_Term(_Both(self, other)),), f"({self._text}) & ({other._text})")

    def __invert__(self) -> "Targets":
        self._refuse_parameters(self)
        return self._combined((self,), (_Term(_Not(self)),), f"~({self._text})")

    def __repr__(self) -> str:
        return f"Targets({self._text})"

    @staticmethod
    def _combined(
        parts: "tuple[Targets, ...]", terms: "tuple[_Term, ...]", text: str, *, named: bool = False
    ) -> "Targets":
        if any(part.is_auto for part in parts):
            raise TargetError(
                "Targets.auto() does not combine: it depends on the model. "
                'Use Targets.of_type(nn.Linear) & ~Targets("lm_head")'
            )
        targets = Targets(*(term.test for term in terms))
        targets._terms, targets._text, targets._named = terms, text, named
        targets._patterns = tuple(dict.fromkeys(pattern for part in parts for pattern in part._patterns))
        return targets

    def _refuse_parameters(self, other: "Targets") -> None:
        if any(term.parameters for term in (*self._terms, *other._terms)):
            raise TargetError(
                '& and ~ choose modules; name parameters last: (Targets("*.attn") & ...).parameter("weight")'
            )

    def resolve(self, model: nn.Module, accepts: Callable[[Site], str | None]) -> "Resolution":
        """The sites in this model, and what was passed over and why.

        accepts: a method's word on a site: None if it can act there, else the reason why not.
        Raises TargetError if a pattern matches nothing, or nothing is left, or a named place cannot be acted on.
        """
        modules = list(modules_of(model))
        self._refuse_idle_patterns(model, modules)
        found = {site.name: site for path, module in modules for site in self._sites(model, path, module)}
        sites: list[Site] = []
        refused: list[tuple[str, str]] = []
        for name, site in found.items():
            reason = accepts(site)
            if reason is None:
                sites.append(site)
            else:
                refused.append((name, reason))
        if refused and (self._named or not sites):
            shown = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in refused[:5])
            raise TargetError(f"{self} names {len(refused)} places that cannot be adapted so. {shown}")
        if not sites:
            raise TargetError(
                f"{self} matches none of the {len(modules)} modules of {type(model).__name__}. {_inventory(modules)}"
            )
        return Resolution(model, tuple(sites), tuple(refused))

    def _sites(self, model: nn.Module, path: str, module: nn.Module) -> list[Site]:
        return [
            _reaching_site(model, path, module, parameter)
            for term in self._terms
            if term.test(path, module)
            for parameter in term.parameters or (None,)
        ]

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
        total = _count(p for _, module in modules_of(self.model) for p in own_weights(module).values())
        covered = _count(p for site in self.sites for p in _parameters(site))
        groups = Counter(
            (re.sub(r"\.\d+(?=\.|$)", ".*", site.name) or "the model", _shape(site)) for site in self.sites
        )
        lines = [f"{len(self.sites)} sites holding {covered:,} of {total:,} parameters ({covered / max(total, 1):.1%})"]
        lines += [f"  {count:4d} x {name}  {shape}" for (name, shape), count in groups.items()]
        lines += [f"  left out {name}: {reason}" for name, reason in self.passed_over]
        taken = {site.path for site in self.sites}
        left = Counter(
            re.sub(r"\.\d+(?=\.|$)", ".*", path) + f"  {type(module).__name__}"
            for path, module in modules_of(self.model)
            if path not in taken and own_weights(module) and path not in dict(self.passed_over)
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
    for path, module in modules_of(model):
        kind = next((k for k in groups if isinstance(kind_of(module), k)), None)
        if kind is None:
            continue
        if any(path == h or path.startswith(h + ".") for h in head):
            left_out[path] = "part of the head"
        else:
            groups[kind].append((path, module))
    sizes = {
        kind: sum(p.numel() for _, module in found for p in own_weights(module).values())
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
    names = {id(module): path for path, module in modules_of(model)}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return [name for name, _ in model.named_children() if name not in (prefix, HELD)]
    if hasattr(model, "base_model_prefix"):  # a transformers body without a head
        output = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return [names[id(output)]] if id(output) in names else []
    if hasattr(model, "get_classifier") and id(cast(Any, model).get_classifier()) in names:
        return [names[id(cast(Any, model).get_classifier())]]
    layers = [path for path, module in modules_of(model) if isinstance(kind_of(module), LinearKind | ConvKind)]
    return layers[-1:] if len(layers) > 1 else []


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def _reaching_site(model: nn.Module, path: str, module: nn.Module, parameter: str | None) -> Site:
    """The site that reaches this module or parameter: a call, or a parameter of the module that reads it."""
    if parameter is not None:
        own = dict(module.named_parameters())
        if parameter not in own:
            has = ", ".join(name for name in own if HELD not in name.split(".")) or "no parameters"
            raise TargetError(
                f"{path or 'the model'} ({type(module).__name__}) has no parameter {parameter}. It has {has}"
            )
    parent_path, _, name = path.rpartition(".")
    if name == "out_proj" and isinstance(model.get_submodule(parent_path), nn.MultiheadAttention):
        # its parent reads the weight and never calls it
        return Site.at(parent_path, model.get_submodule(parent_path), f"out_proj.{parameter or 'weight'}")
    return Site.at(path, module, parameter)


@dataclass(frozen=True)
class _Term:
    """One alternative of the targets: which modules, and which of their parameters; none means their call."""

    test: Predicate
    parameters: tuple[str, ...] = ()


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
    """`*` any text, `?` one character, {0-11} numbers, {a,b} alternatives; matches a whole path or its end."""
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


def _parameters(site: Site) -> list[Tensor]:
    if site.parameter is not None:
        return [site.stored]
    if site.kind is not None:
        return list(own_weights(site.layer).values())
    return [p for name, p in site.layer.named_parameters() if HELD not in name.split(".")]


def _count(parameters: Iterable[Tensor]) -> int:
    held = list(parameters)  # while they are counted: a weight in few bits has no other holder
    return sum({id(p): p.numel() for p in held}.values())


def _shape(site: Site) -> str:
    return type(site.layer).__name__ if site.kind is None else f"{site.kind.name} {site.fan_in} -> {site.fan_out}"


def last_match(pattern: Mapping[str, Value], site: Site, default: Value) -> Value:
    """The value of the last glob in {glob: value} that matches a site, or the default."""
    matching = [value for glob, value in pattern.items() if Targets(glob).matches(site.name, site.layer)]
    return matching[-1] if matching else default
