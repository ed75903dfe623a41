"""DiReFT: LoReFT without orthonormal rows and without the difference.  Wu et al. 2024, arXiv:2404.03592, equation 3.

    h' = h + P^T f(W h + b)

P, W: (r, D)   b: (r,)   D = features, r = rank.   f: nothing in the paper.   W and b start at zero, so training starts
from the base model.   Trainable parameters: 2 r D + r per block, twice that where first and last tokens have their own.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..core.disk_names import DiskNames
from ..core.method import method
from .loreft import ReFT, Unit


class DirectUnit(Unit):
    """P^T f(W h + b)."""

    subtracts = False


@method("direft")
@dataclass(frozen=True, kw_only=True)
class DiReFT(ReFT):
    """Representation fine-tuning by what is added, at a lower price than LoReFT."""

    unit: ClassVar[type[Unit]] = DirectUnit
    summary = "h' = h + P^T (W h + b) at a few tokens"
    disk = DiskNames("SMIDGEN_DIREFT")
