"""QA-LoRA in Hugging Face PEFT's folder, which it has on GPTQ layers only.

It multiplies the mean of a group by the number of groups, I / G; the paper and we take the sum, G times the mean.  So
their alpha is read as alpha I / G^2.  Elsewhere HF PEFT ignores use_qalora, and the folder is a plain LoRA's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.method import Method
from ..core.site import Site
from ..core.targets import last_match
from .layout import PREFIX, Modules, clean
from .peft_lora import LoRATranslation
from .translation import Found, Shapes, exact_names, number


class QALoRATranslation(LoRATranslation):
    """Read from HF PEFT's folders; written in our own layout."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        return "HF PEFT has QA-LoRA only on GPTQ layers, and ignores it elsewhere"

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, {**config, "use_qalora": False}, shapes)
        first = found.sites[0] if found.sites else None
        if first is not None and shapes.get(f"{PREFIX}{clean(first.path)}.lora_A.weight", ())[1:] == (first.fan_in,):
            return Found({**found.settings, "group_size": 1}, found.sites)
        size = number(config, "qalora_group_size", whole=True)
        alpha, pattern = found.settings["alpha"], found.settings["alpha_pattern"]
        ours = {s.name: last_match(pattern, s, alpha) * s.fan_in / size**2 for s in found.sites}
        return Found({**found.settings, "group_size": size, "alpha_pattern": exact_names(ours, alpha)}, found.sites)
