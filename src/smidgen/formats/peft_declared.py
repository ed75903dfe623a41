"""A method's `disk` is enough where Hugging Face PEFT has the same tensors under other names: what follows from it.

    fields    settings by another name; those that end in `_pattern` are per site, by theirs `<field>_pattern`
    tensors   base_model.model.<path>.<suffix>, and base_model.<suffix> of what all sites share
    fixed     what their config has to say for it to be this method

A method whose tensors have another shape or order there has a subclass in `peft_<method>.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .peft_fields import FIELDS
from .translation import (
    Found,
    PeftTranslation,
    Shapes,
    as_number,
    exact_names,
    first_match,
    otherwise,
    pattern_of,
    refuse_unknown,
    target_modules,
    transposed,
)


class DeclaredTranslation(PeftTranslation):
    """Follows `method.disk`."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        for site in sites:
            by_weight = site.parameter is None or method.placed(Site.at(site.path, site.layer)).name == site.name
            if not site.path or not by_weight or site.kind is None or site.kind.name not in self.disk.kinds:
                where = site.name or "the model"
                return f"{where}: HF PEFT has no {self.disk.peft_type} for {type(site.layer).__name__}"
        return next(filter(None, map(self.unlike, sites)), None)

    def unlike(self, site: Site) -> str | None:
        """Why HF PEFT refuses this site, or computes something else there; or None."""
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        known, settings = FIELDS[self.peft_type], self.settings(method, sites)
        found: dict[str, Any] = dict(self.disk.fixed)
        for name, value in settings.items():
            theirs = self.disk.fields.get(name, name)
            if theirs not in known:
                continue
            if name.endswith("_pattern"):
                value = {_pattern(modules, path): number for path, number in value.items()}
            found[theirs] = value
        found["target_modules"] = target_modules(modules, sorted({clean(site.path) for site in sites}))
        if "fan_in_fan_out" in known:
            found["fan_in_fan_out"] = transposed(sites)
        return found

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        return [
            Stored(self.key(site, name), ((site.name, name),)) for site in sites for name in sorted(tensors[site.name])
        ]

    def key(self, site: Site, name: str) -> str:
        """The key of one tensor."""
        suffix = self.disk.tensors.get(name, name)
        return f"base_model.{suffix}" if name.startswith("shared.") else f"{PREFIX}{clean(site.path)}.{suffix}"

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        known, theirs_of = FIELDS[self.peft_type], self._own_fields()
        fixed = set(self.disk.fixed) - set(otherwise(config, self.disk.fixed))
        refuse_unknown(config, frozenset({*theirs_of.values(), *self.disk.ignored, *fixed}))
        sites = self.sites(modules, shapes)
        if reasons := list(filter(None, map(self.unlike, sites))):
            raise FolderError(f"cannot be followed: {'; '.join(reasons[:5])}. Train it again with smidgen")
        settings: dict[str, Any] = {}
        for name, theirs in theirs_of.items():
            if name.endswith("_pattern"):
                continue
            value = config.get(theirs, known[theirs])
            is_number = isinstance(known[theirs], int | float) and not isinstance(known[theirs], bool)
            settings[name] = as_number(value, theirs) if is_number else value
        for name, theirs in theirs_of.items():
            if name.endswith("_pattern"):
                default, found = settings[name.removesuffix("_pattern")], pattern_of(config, theirs)
                values = {site.name: first_match(found, clean(site.path), default) for site in sites}
                settings[name] = exact_names(values, default)
        return Found(settings, tuple(sites))

    def sites(self, modules: Modules, shapes: Shapes) -> list[Site]:
        """The places that the keys name, in the order of the file."""
        ends = tuple("." + end for name, end in self.disk.tensors.items() if not name.startswith("shared."))
        paths = {
            key.removeprefix(PREFIX).removesuffix(end): None
            for key in shapes
            for end in ends
            if key.startswith(PREFIX) and key.endswith(end)
        }
        return [modules.site(path) for path in paths if path in modules]

    def _own_fields(self) -> dict[str, str]:
        """Our setting -> their field, for those that they have."""
        names = [f.name for f in fields(self.method) if f.name not in ("targets", "heads")]
        both = {name: self.disk.fields.get(name, name) for name in names}
        return {name: theirs for name, theirs in both.items() if theirs in FIELDS[self.peft_type]}


def _pattern(modules: Modules, path: str) -> str:
    """A key that means this path alone.  Some of HF PEFT's methods match it after a dot, others know ^."""
    end = path.partition(".")[2]
    return re.escape(end) if end and modules.ending({end}) == {path} else "^" + re.escape(path)
