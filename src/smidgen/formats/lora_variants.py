"""What LoRA's variants of Hugging Face PEFT have in common: a field of LoraConfig that is null unless it is meant.

They act on linear layers.  Tensors beside A and B stand under the names that the method's `disk` says.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..core.errors import FolderError
from ..core.layers import LinearKind
from ..core.method import Method
from ..core.site import Site
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .peft_lora import LoRATranslation
from .translation import Found, Shapes


class LoRAVariantTranslation(LoRATranslation):
    """A subclass says the field, what it holds, and what that means.

    known: keys of the mapping that it holds, with HF PEFT's defaults.
    """

    field: ClassVar[str]
    known: ClassVar[Mapping[str, Any]] = {}

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        """What the field holds for this method."""
        raise NotImplementedError

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        """Our settings from what the field holds, defaults filled in."""
        raise NotImplementedError

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        for site in sites:
            if site.parameter or not isinstance(site.kind, LinearKind):
                what = "parameters" if site.parameter else type(site.layer).__name__
                return f"{site.name or 'the model'}: HF PEFT has no {type(method).__name__} for {what}"
        return super().obstacle(modules, method, sites)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        return {**super().fields(modules, method, sites), self.field: self.written(method, sites)}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        more = {name: end for name, end in self.disk.tensors.items() if name not in ("A", "B", "bias")}
        own = [
            Stored(f"{PREFIX}{clean(site.path)}.{end}", ((site.name, name),))
            for site in sites
            for name, end in more.items()
        ]
        return super().stored_peft(method, sites, tensors) + own

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, {**config, self.field: None}, shapes)
        return Found({**found.settings, **self.read(self._value(config), found.sites)}, found.sites)

    def _value(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        value = config[self.field]
        if not self.known:
            return {self.field: value}
        if not isinstance(value, dict) or not set(value) <= set(self.known):
            raise FolderError(
                f"{self.field} is {str(value)[:200]!r}; it is a mapping with the keys {', '.join(self.known)}"
            )
        return {**self.known, **value}
