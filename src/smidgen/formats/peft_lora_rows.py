"""LoRA on some rows in Hugging Face PEFT's folder: a plain LoRA, whose B is zero elsewhere.

Our note says which rows they are; a folder without it is read as a plain LoRA, which does the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..core.errors import FolderError
from ..core.method import Method
from ..core.site import Site
from ..methods.lora_rows import LoRARows, spread
from .layout import Stored, Tensors
from .peft_lora import LoRATranslation


class LoRARowsTranslation(LoRATranslation):
    """As LoRA's, with B written whole."""

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        of, rows = {site.name: site for site in sites}, cast(LoRARows, method).rows_at
        entries = super().stored_peft(method, sites, tensors)
        return [
            _Whole(entry, of[name], rows(of[name])).stored() if tensor == "B" else entry
            for entry in entries
            for name, tensor in entry.holds
        ]


@dataclass(frozen=True)
class _Whole:
    """B of all rows, which holds B of some."""

    entry: Stored  # of a whole B
    site: Site
    rows: list[int]

    def stored(self) -> Stored:
        return Stored(self.entry.key, self.entry.holds, self.pack, self.unpack)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        (B,) = tensors
        return self.entry.pack([spread(B, torch.tensor(self.rows, device=B.device), self.site)])

    def unpack(self, tensor: Tensor) -> Sequence[Tensor]:
        (whole,) = self.entry.unpack(tensor)
        B = whole.view(self.site.linear.stack, self.site.fan_out, -1)[:, self.rows].flatten(0, 1)
        if B.count_nonzero() != whole.count_nonzero():
            raise FolderError(
                f"{self.entry.key} changes other rows than smidgen.json says: something trained it since. Remove "
                "smidgen.json, to read it as a plain LoRA"
            )
        return (B,)
