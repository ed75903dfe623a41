"""NoReFT: LoReFT without orthonormal rows.  Wu et al. 2024, arXiv:2404.03592, section 4.1 and appendix.

    h' = h + P^T (f(W h + b) - P h)

P, W: (r, D)   b: (r,)   D = features, r = rank.   f: nothing in the paper.   W starts at P and b at zero, so training
starts from the base model.   Trainable parameters: 2 r D + r per block, twice that where first and last tokens have
their own.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..core.disk_names import DiskNames
from ..core.method import method
from .loreft import ReFT, Unit


@method("noreft")
@dataclass(frozen=True, kw_only=True)
class NoReFT(ReFT):
    """Representation fine-tuning with a free projection."""

    unit: ClassVar[type[Unit]] = Unit
    summary = "h' = h + P^T (W h + b - P h) at a few tokens"
    disk = DiskNames("SMIDGEN_NOREFT")
