"""MonteCLoRA in Hugging Face PEFT's folder: LoRA's, and what its sampler has learned and last drawn.

ours            theirs, under lora_monteclora_sampler
t (R,)          std_prior (R,)
u (N,)          expert_weights_prior (N,)
p (N,)          expert_weights (N,)
variance (R,)   gaussian_var_prior (R, R), diagonal
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor

from ..core.method import Method
from ..core.site import Site
from ..methods.monteclora import MonteCLoRA
from .layout import Stored, Tensors
from .lora_variants import LoRAVariantTranslation
from .translation import as_number

_NAMES = {  # ours -> theirs
    "samples": "num_samples",
    "entropy": "use_entropy",
    "dirichlet_prior": "dirichlet_prior",
    "sample_scale": "sample_scaler",
    "kl_weight": "kl_loss_weight",
}


class MonteCLoRATranslation(LoRAVariantTranslation):
    """MonteCLoRA on linear layers.   Their buffer_size says how many samples are drawn at once."""

    field = "monteclora_config"
    known: ClassVar[Mapping[str, Any]] = {
        "num_samples": 8,
        "use_entropy": False,
        "dirichlet_prior": 0.1,
        "sample_scaler": 1e-4,
        "kl_loss_weight": 1e-5,
        "buffer_size": 150,
    }

    def written(self, method: Method, sites: Sequence[Site]) -> Any:
        return {**self.known, **{theirs: getattr(cast(MonteCLoRA, method), ours) for ours, theirs in _NAMES.items()}}

    def read(self, value: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
        found = {
            ours: as_number(value[theirs], f"{self.field}: {theirs}", whole=ours == "samples")
            for ours, theirs in _NAMES.items()
            if ours != "entropy"
        }
        return {**found, "entropy": bool(value["use_entropy"])}

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        stored = super().stored_peft(method, sites, tensors)
        return [
            replace(entry, pack=_as_matrix, unpack=_diagonal) if entry.holds[0][1] == "variance" else entry
            for entry in stored
        ]


def _as_matrix(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].diag()


def _diagonal(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.diagonal(),)
