"""VeLoRA in Hugging Face PEFT's folder: LoRA's, and lora_velora_embed (D,), which only training reads."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from ..core.method import Method
from ..core.site import Site
from ..methods.velora import VeLoRA
from .lora_variants import LoRAVariantTranslation
from .translation import as_number


class VeLoRATranslation(LoRAVariantTranslation):
    """VeLoRA on linear layers."""

    field = "velora_config"
    known: ClassVar[Mapping[str, Any]] = {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"}

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        method = cast(VeLoRA, method)
        return {"num_groups": method.groups, "scale": method.gradient_scale, "init_type": method.projection}

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "groups": as_number(value["num_groups"], f"{self.field}: num_groups", whole=True),
            "gradient_scale": float(as_number(value["scale"], f"{self.field}: scale")),
            "projection": value["init_type"],
        }
