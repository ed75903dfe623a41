"""AdaLoRA in Hugging Face PEFT's folder: the kept triplets; `rank_pattern` says which of each site's they were."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from ..core.layers import ConvKind
from ..core.method import Method
from ..core.site import Site
from ..core.targets import last_match
from ..methods.adalora import AdaLoRA
from .layout import Modules, clean
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes, exact_names


class AdaLoRATranslation(DeclaredTranslation):
    """Linear layers and ungrouped 2-D convolutions."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        for site in sites:
            layer = site.layer
            if isinstance(site.kind, ConvKind):
                plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
                if not plain:
                    return f"{site.name}: HF PEFT has AdaLoRA for ungrouped, zero-padded 2-D convolutions alone"
        return super().obstacle(modules, method, sites)

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        method = cast(AdaLoRA, method)
        ranks = {clean(site.path): last_match(method.rank_pattern, site, method.start_rank) for site in sites}
        pattern = {
            f"{path}.lora_E": [True] * rank + [False] * (method.start_rank - rank) for path, rank in ranks.items()
        }
        found = super().fields(modules, method, sites)
        return found | {"rank_pattern": pattern if method.rank_pattern else None, "total_step": 1}  # it wants a number

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        found = super().find(modules, config, shapes)
        start = found.settings["start_rank"]
        ranks = {site.name: shapes[self.key(site, "E")][0] for site in found.sites}
        found.settings["rank_pattern"] = exact_names(ranks, start)
        return found

    def _own_fields(self) -> dict[str, str]:
        return {name: theirs for name, theirs in super()._own_fields().items() if name != "rank_pattern"}
