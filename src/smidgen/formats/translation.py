"""How a method stands in an adapter folder: in our own layout, and in Hugging Face PEFT's where it has the method.

A method file says its names on disk in `disk = DiskNames(...)`, and for a method that HF PEFT lacks that is all:

    disk = DiskNames("SMIDGEN_BOTTLENECK")                                   parameters and settings keep their names
    disk = DiskNames("SMIDGEN_BITFIT", tensors={"change": "bias"})           or have others on disk

Where HF PEFT has the method, `peft_declared.py` follows what `disk` says, or `peft_<method>.py` knows more.  Its layout
is written whenever it can hold the adapter; `obstacle` says why it cannot, and then our own layout is written under
"SMIDGEN_<METHOD>", so that HF PEFT fails by name and not by accident.

Settings are written as JSON and read back as tuples, dicts, numbers and texts, so that is what they may be.  Those
whose names end in `_pattern` are {glob: value}; they are written as {site: value}: no pattern from a file is ever run.
`build` is also run without memory, to learn shapes: it makes parameters and computes nothing with them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import FolderError
from ..core.layers import TransposedLinearKind
from ..core.method import Method
from ..core.site import Site
from ..core.targets import Targets
from .layout import PREFIX, Modules, Stored, Tensors, clean, stored_tensors
from .peft_fields import FIELDS, HARMLESS_STARTS, WITHOUT_EFFECT

Shapes = Mapping[str, tuple[int, ...]]  # key as we write it -> shape in the file


class Translation:
    """A method in our own layout."""

    globs: ClassVar[tuple[str, ...]] = ()  # settings that are lists of globs

    def settings(self, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        """The method's settings for disk: patterns as the sites that they mean."""
        return {
            name: by_site(value, sites) if name.endswith("_pattern") else value
            for name, value in method.settings().items()
        }

    def stored(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        """What stands in the file for each tensor of the adapter, heads apart."""
        return stored_tensors(method.disk, sites, tensors)


@dataclass(frozen=True)
class Found:
    """What a folder without `smidgen.json` holds: the settings, where the adapter lives, and in which order."""

    settings: dict[str, Any]
    sites: tuple[Site, ...]


class PeftTranslation(Translation):
    """A method that HF PEFT has, in both layouts."""

    prefix: ClassVar[str] = PREFIX  # of the keys of heads
    needs_task: ClassVar[bool] = False  # HF PEFT applies it only where the file says a task_type

    def __init__(self, method: type[Method]) -> None:
        self.method, self.disk, self.peft_type = method, method.disk, method.disk.peft_type

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        """Why HF PEFT's layout cannot hold this adapter, or None."""
        raise NotImplementedError

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        """The fields of adapter_config.json that differ from HF PEFT's defaults, the common ones apart."""
        raise NotImplementedError

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        """`stored`, in HF PEFT's layout."""
        raise NotImplementedError

    def repeats(self, key: str) -> str | None:
        """The key of the tensor that this one is a copy of, where HF PEFT writes a tensor once for each site."""
        return None

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        """The adapter in a folder that HF PEFT wrote.  Sites come from the tensors' names.  Raises FolderError."""
        raise NotImplementedError


def by_site(pattern: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """{glob: value} as {name of the site: value}, so that reading it back gives each site the same."""
    if not pattern:
        return {}
    globs = [(Targets(glob), value) for glob, value in reversed(list(pattern.items()))]
    values: dict[str, Any] = {}
    for site in sites:
        found = [value for targets, value in globs if targets.matches(site.name, site.layer)]
        if found:
            values[clean(site.name)] = found[0]
    return in_order(values)


def exact_names(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """{site: value} of all sites as a pattern of those that differ from the default, and of their namesakes."""
    differ = [name for name, value in values.items() if value != default]
    if not differ:
        return {}
    ends = tuple(f".{name}" for name in differ)
    kept = {name: value for name, value in values.items() if value != default or name.endswith(ends)}
    return in_order(kept)


def in_order(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """{site: value} with longer names later: the last match counts, and "a.b" is also the end of "c.a.b"."""
    return dict(sorted(pattern.items(), key=lambda item: (item[0].count("."), item[0])))


def plain(pattern: Any, field: str) -> str:
    """The path, or end of a path, that a pattern from a file means.  Raises FolderError if it is more than that."""
    text = pattern if isinstance(pattern, str) else ""
    text = text.removeprefix("^").removesuffix("$").removeprefix("(.*\\.)?").removeprefix(".*\\.")
    text = re.sub(r"\\(\W)", r"\1", text)
    if not text or set(text) & set("\\^$*+?{}[]()|"):
        raise FolderError(
            f"{field} holds {str(pattern)[:80]!r}. Patterns from a file are not run: "
            "write the paths, or ends of paths, that it means"
        )
    return text


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """HF PEFT's rule: the first key that is the name or, without ^, its end after a dot counts."""
    return next(
        (v for end, v in patterns.items() if name == end.removeprefix("^") or name.endswith("." + end)), default
    )


def number(config: Mapping[str, Any], field: str, *, whole: bool = False) -> Any:
    """A number from adapter_config.json.  Raises FolderError if it is none."""
    return as_number(config.get(field, FIELDS[str(config["peft_type"])][field]), field, whole=whole)


def as_number(value: Any, field: str, *, whole: bool = False) -> Any:
    """The value, if it is a number of a sensible size.  Raises FolderError."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or abs(value) > 1 << 40:
        raise FolderError(f"{field} is {str(value)[:80]!r}, not a {'whole ' if whole else ''}number")
    return value


def pattern_of(config: Mapping[str, Any], field: str, *, whole: bool = False) -> dict[str, Any]:
    """A field {pattern: number} with plain patterns.  Raises FolderError."""
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise FolderError(f"{field} is {str(value)[:80]!r}, not a mapping")
    return {
        "^" * key.startswith("^") + plain(key, field): as_number(number, f"{field} of {key!r:.80}", whole=whole)
        for key, number in value.items()
    }


def refuse_unknown(config: Mapping[str, Any], used: Mapping[str, Any] | frozenset[str]) -> None:
    """Raise FolderError naming all fields that change the numbers and that we cannot follow."""
    defaults = FIELDS[str(config["peft_type"])]
    bad = {
        name: value
        for name, value in config.items()
        if name not in used
        and name not in WITHOUT_EFFECT
        and value != defaults.get(name)
        and not (name not in defaults and not value)  # of a later version, and off
        and not (name == "init_lora_weights" and value in HARMLESS_STARTS)
        and not (name in defaults and not value and not defaults[name])  # null, {}, [] and false are all "off"
    }
    if bad:
        shown = ", ".join(f"{name} = {str(value)[:60]!r}" for name, value in list(bad.items())[:8])
        raise FolderError(
            f"adapter_config.json asks for what cannot be done here: {shown}. "
            "Merge the adapter with the tool that made it, or train it without"
        )


def otherwise(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """The fields that a method fixes (`...`: to anything but null) and that a config has otherwise."""
    defaults = FIELDS[str(config["peft_type"])]
    values = {name: config.get(name, defaults[name]) for name in fixed}
    return [name for name, value in fixed.items() if (values[name] is None if value is ... else values[name] != value)]


def target_modules(modules: Modules, paths: Sequence[str]) -> list[str] | str:
    """HF PEFT's target_modules for exactly these paths: ends of paths, else whole paths, else a pattern."""
    wanted = set(paths)
    ends = {path.rpartition(".")[2] for path in paths}
    for choice in (ends, wanted):
        if modules.ending(choice) == wanted:
            return sorted(choice)
    return "(?:" + "|".join(re.escape(path) for path in sorted(wanted)) + ")"


def transposed(sites: Sequence[Site]) -> bool:
    """True if any layer stores its weight as (I, O): HF PEFT's fan_in_fan_out."""
    return any(isinstance(site.kind, TransposedLinearKind) for site in sites)
