"""LoRA's starts in Hugging Face PEFT's folder.

A start that is taken out of the weight (PiSSA, OLoRA, ...) is written as a plain LoRA of twice the rank, [A; A0] and
[B, -B0], which fits the base as it is.  In folders of its own HF PEFT takes it out of the base anew at each load: so do
we where it follows from the base, and refuse where it was drawn or found on data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core import starts
from ..core.errors import FolderError
from ..core.layers import LinearKind, TransposedLinearKind
from ..core.site import Site
from ..methods.lora import LoRA, beside
from .layout import Stored

OF_BASE = ("pissa", "olora", "mica")  # theirs that follow from the base, and are ours by the same name
NOT_IN_FOLDER = ("pissa_niter", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class _Pair:
    """A and A0, or B and -B0, as one tensor; in a folder of HF PEFT's own the first alone, and `start` is the other."""

    entry: Stored  # of A or B alone
    stack: int
    start: Callable[[], Tensor] | None

    def stored(self) -> Stored:
        ((site, name),) = self.entry.holds
        return Stored(self.entry.key, ((site, name), (site, f"{name}0")), self.pack, self.unpack)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        one, other = tensors
        if self.start is None:
            one = beside(one, other, self.stack) if self._is_A else torch.cat([one, -other], 1)
        return self.entry.pack([one])

    def unpack(self, tensor: Tensor) -> Sequence[Tensor]:
        (both,) = self.entry.unpack(tensor)
        if self.start is not None:
            return both, self.start()
        if self._is_A:
            one, other = both.view(self.stack, -1, both.shape[1]).chunk(2, 1)
            return one.flatten(0, 1), other.flatten(0, 1)
        one, other = both.chunk(2, 1)
        return one, -other

    @property
    def _is_A(self) -> bool:
        return self.entry.holds[0][1] == "A"


def with_start(entries: Sequence[Stored], method: LoRA, site: Site) -> list[Stored]:
    """Of a start that is subtracted, A with A0 and B with B0."""
    at_start = cache(lambda: starts.of_weight(method.start, site, method.rank_at(site), method.scale_at(site)))
    told = (lambda: at_start()[0], lambda: at_start()[1]) if method.of_changed_base else (None, None)
    return [_Pair(entry, site.linear.stack, told["AB".index(entry.holds[0][1])]).stored() for entry in entries]


def is_known(start: Any) -> bool:
    """True if this init_lora_weights is followed, or refused with its own reason."""
    return isinstance(start, str) and (start in OF_BASE or start.startswith(NOT_IN_FOLDER))


def refuse_start(start: Any, sites: Sequence[Site]) -> None:
    """Raise FolderError where HF PEFT changed the base and the folder does not say how."""
    if start == "loftq":
        raise FolderError(
            "init_lora_weights is loftq: it was trained on the base that LoftQ quantised, which is not in the folder. "
            "Save that base with the tool that made it, load it here, and set init_lora_weights to true"
        )
    if start not in OF_BASE and is_known(start):
        raise FolderError(
            f"init_lora_weights is {start[:80]}: HF PEFT changed the base by what it drew, or found on data, and the "
            "folder does not say what that was. Convert it where it was trained: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...) writes a plain LoRA"
        )
    odd = [s for s in sites if not isinstance(s.kind, LinearKind)] if start in ("pissa", "olora") else []
    odd += [s for s in sites if isinstance(s.kind, TransposedLinearKind)] if start == "olora" else []
    if odd:
        raise FolderError(
            f"init_lora_weights is {start} at {odd[0].name}: on {type(odd[0].layer).__name__} HF PEFT takes something "
            "else out of the base than B A. Merge it with the tool that made it"
        )
