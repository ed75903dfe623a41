"""OSF in Hugging Face PEFT's folder: the same tensors; their shapes say how many singular values are kept where.

A pattern of HF PEFT's counts wherever in a path it is found, so ours name whole paths.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.osf import OSF
from .layout import PREFIX, Modules, clean
from .peft_declared import DeclaredTranslation
from .translation import Found, Shapes, as_number, exact_names, refuse_unknown


class OSFTranslation(DeclaredTranslation):
    """OSF on linear layers."""

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        pattern = self.settings(method, sites)["effective_rank_pattern"]
        whole = {f"^{re.escape(path)}$": rank for path, rank in pattern.items()}
        return super().fields(modules, method, sites) | {"rank_pattern": whole or None}

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        refuse_unknown(config, frozenset({"effective_rank", "rank_pattern", "target_svd_config"}))
        asked = config.get("effective_rank")
        rank = 0.5 if asked is None else as_number(asked, "effective_rank")
        sites, ranks = self.sites(modules, shapes), {}
        for site in sites:
            trained = shapes.get(f"{PREFIX}{clean(site.path)}.{self.disk.tensors['S']}", ())
            if len(trained) != 1 or site.kind is None:
                raise FolderError(
                    f"{site.path} has no osf_svd_params.S_low, which says how many directions were trained"
                )
            kept = min(site.fan_in, site.fan_out) - trained[0]
            ranks[site.name] = rank if OSF(effective_rank=rank).kept_at(site) == kept else kept
        return Found({"effective_rank": rank, "effective_rank_pattern": exact_names(ranks, rank)}, tuple(sites))
