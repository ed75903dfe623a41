"""SHiRA: train a sparse set of a weight's own entries.  Bhardwaj et al. 2024, arXiv:2406.13175.

    W' = W + D          D is v at n chosen entries of W and zero elsewhere          n = R (I + O)

I = fan-in, O = fan-out.   R says how many entries: as many numbers as LoRA has at this rank; the rank of D is high.
The entries are drawn from `seed` (SHiRA-Rand), or are those of a mask.   v starts at zero, so training starts from the
base model.   Trainable parameters: R (I + O) per site, or the ones in its mask.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.method import Method, method
from ..core.site import Site
from ..core.sparse import SparseAdapter, check_places, matrix_shape


@method("shira")
@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """A sparse change.

    rank: R, of the LoRA with as many parameters.   seed: of the places, the same for sites of the same shape.
    masks: name of a site -> the entries to train there, True in a bool (O, I).  Sites without one draw theirs.
    """

    rank: int = 32
    seed: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # tensors do not compare

    summary = "W' = W + D, where D has R (I + O) entries"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    disk = DiskNames(
        "SHIRA",
        fields={"rank": "r"},
        tensors={"values": "shira_weight", "indices": "shira_indices"},
        kinds=("linear",),
        ignored=("mask_type", "random_seed"),  # the entries are in the file
    )

    def check(self) -> None:
        require_whole(self, "rank")

    def entries_at(self, site: Site) -> int:
        """n at this site."""
        if site.name in self.masks:
            return self._given(site).shape[1]
        return self.rank * (site.fan_in + site.fan_out) * site.linear.stack

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank, "seed": self.seed}

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> Method:
        held = {site: named["indices"] for site, named in tensors.items() if "indices" in named}
        method = replace(self, masks={site.name: indices for site, indices in held.items()})
        for site in held:
            method._given(site)
        return method

    def build(self, site: Site) -> "SHiRAAdapter":
        if site.name in self.masks:
            return SHiRAAdapter(self, site, self._given(site))
        wanted, size = self.entries_at(site), math.prod(matrix_shape(site))
        require(wanted <= size, f"{site.name}: rank {self.rank} asks for {wanted:,} entries of a weight of {size:,}")
        return SHiRAAdapter(self, site, None)

    def _given(self, site: Site) -> Tensor:
        """Rows and columns (2, n) of the mask of this site."""
        mask, shape = self.masks[site.name], matrix_shape(site)
        if mask.dtype == torch.bool:
            require(
                tuple(mask.shape) == shape and bool(mask.any()),
                f"the mask of {site.name} is {tuple(mask.shape)} with {int(mask.sum())} entries chosen; "
                f"it has to be {shape} with at least one",
            )
            return mask.nonzero().T
        require(mask.ndim == 2 and len(mask) == 2, f"the indices at {site.name} are {tuple(mask.shape)}, not (2, n)")
        rows, columns = mask[0].long(), mask[1]
        check_places((rows * shape[1] + columns).where((columns >= 0) & (columns < shape[1]), -1), site)
        return mask


class SHiRAAdapter(SparseAdapter):
    """v at one site, and its rows and columns (2, n)."""

    indices: Tensor

    def __init__(self, method: SHiRA, site: Site, given: Tensor | None) -> None:
        super().__init__(site)
        self.seed, self.given = method.seed, given
        self.values = site.empty(method.entries_at(site))
        self.register_buffer("indices", torch.empty(2, len(self.values), dtype=torch.int32, device=self.values.device))

    def prepare(self) -> None:
        if self.given is None:
            O, I = matrix_shape(self.site)
            drawn = torch.randperm(O * I, generator=torch.Generator().manual_seed(self.seed))[: len(self.values)]
            drawn = drawn.sort().values
            self.indices.copy_(torch.stack([drawn // I, drawn % I]))
        else:
            self.indices.copy_(self.given)
        self.given = None

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.values)

    def places(self) -> Tensor:
        return self.indices[0].long() * self.site.fan_in + self.indices[1]
