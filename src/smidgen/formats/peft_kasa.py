"""KaSA in Hugging Face PEFT's folder: LoRA's, and lora_diag (R,).  It truncates the base's weight whenever it loads."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from ..core.layers import TransposedLinearKind
from ..core.method import Method
from ..core.site import Site
from ..methods.kasa import KaSA
from .layout import Modules
from .lora_variants import LoRAVariantTranslation
from .translation import as_number


class KaSATranslation(LoRAVariantTranslation):
    """KaSA on nn.Linear."""

    field = "kasa_config"
    known: ClassVar[Mapping[str, Any]] = {"beta": 1e-4, "gamma": 1e-3}

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if any(isinstance(site.kind, TransposedLinearKind) for site in sites):
            return "HF PEFT has no KaSA for transposed layers such as GPT-2's Conv1D"
        return super().obstacle(modules, method, sites)

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        method = cast(KaSA, method)
        return {"beta": method.beta, "gamma": method.gamma}

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        return {name: float(as_number(number, f"{self.field}: {name}")) for name, number in value.items()}
