"""SHiRA in Hugging Face PEFT's folder: the same tensors; there, all sites have R (I + O) entries."""

from collections.abc import Sequence
from typing import cast

from ..core.method import Method
from ..core.site import Site
from ..methods.shira import SHiRA
from .layout import Modules
from .peft_declared import DeclaredTranslation


class SHiRATranslation(DeclaredTranslation):
    """SHiRA on linear layers."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        if reason := super().obstacle(modules, method, sites):
            return reason
        method = cast(SHiRA, method)
        for site in sites:
            has, needs = method.entries_at(site), method.rank * (site.fan_in + site.fan_out)
            if has != needs:
                return f"{site.name}: {has} entries, and HF PEFT's rank {method.rank} means {needs}"
        return None
