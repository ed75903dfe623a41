"""Super-Tuning: train the largest entries of a weight, and with a rank LoRA beside them.  2026, arXiv:2607.09287.

    W' = W + D + s B A          D is v at n chosen entries of W and zero elsewhere          s = alpha / R

n = floor((1 - sparsity) O I) entries, the largest of |W| or the smallest.   A: (R, I)   B: (O, R)   I = fan-in,
O = fan-out, R = rank; without a rank there is no B A ("Super"; with it "Supra").
v and B start at zero, so training starts from the base model.   Trainable parameters: n + R (I + O) per site.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_finite, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import Gradients, Pullback
from ..core.method import Method, method
from ..core.site import Site
from ..core.sparse import SparseAdapter, check_places, matrix_shape
from .loha import stacked_product


@method("supertuning")
@dataclass(frozen=True, kw_only=True)
class SuperTuning(Method):
    """The largest entries.

    sparsity: share of the entries that are not trained.   largest: train the largest of them, False: the smallest.
    rank: R of the low-rank part, None for none.   alpha: it is scaled by alpha / R; 2 R where nothing is said.
    dropout: probability of dropping an entry of its input while training.
    save_indices: write which entries they are; False: reading finds them again, in the very weights trained on.
    """

    sparsity: float = 0.99
    largest: bool = True
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    save_indices: bool = True

    summary = "W' = W + D + s B A, D where |W| is largest"
    paper = "2026, arXiv:2607.09287"
    reads_weight = True
    disk = DiskNames(
        "SUPERTUNING",
        fields={
            "largest": "select_top",
            "rank": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "save_indices": "save_precomputed_indices",
        },
        tensors={
            "values": "supertuning_values",
            "indices": "supertuning_indices",
            "A": "supertuning_lora_A.weight",
            "B": "supertuning_lora_B.weight",
        },
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        require_finite(self, "alpha")
        require_share(self, "sparsity", "dropout")
        require(self.alpha is None or self.rank is not None, f"alpha is {self.alpha}, but there is no rank to scale")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.entries_at(site) < 1:
            return f"a sparsity of {self.sparsity} leaves none of its {math.prod(matrix_shape(site)):,} entries"
        return None

    def entries_at(self, site: Site) -> int:
        """n at this site, by HF PEFT's rounding: a fifth of 30 is 5, for 1 - 0.8 is less than 0.2."""
        return int(math.prod(matrix_shape(site)) * (1 - self.sparsity))

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> Method:
        for site, held in tensors.items():
            if "indices" in held:
                check_places(held["indices"], site)
        return self

    def build(self, site: Site) -> "SuperTuningAdapter":
        return SuperTuningAdapter(self, site)


class SuperTuningAdapter(SparseAdapter):
    """v at one site and its flat places (n,); A and B.  Stacked experts have their own A (E R, I), B (E O, R)."""

    indices: Tensor

    def __init__(self, method: SuperTuning, site: Site) -> None:
        super().__init__(site)
        self.largest, self.dropout = method.largest, method.dropout
        self.values = site.empty(method.entries_at(site))
        places = torch.empty(len(self.values), dtype=torch.int32, device=self.values.device)
        self.register_buffer("indices", places, persistent=method.save_indices)
        self.A = self.B = None
        if method.rank is not None:
            self.scale = (2 * method.rank if method.alpha is None else method.alpha) / method.rank
            self.A = site.empty(site.linear.stack * method.rank, site.fan_in)
            self.B = site.empty(site.linear.stack * site.fan_out, method.rank)

    def prepare(self) -> None:
        W = self.site.weight().abs().flatten()
        self.indices.copy_(W.topk(len(self.values), largest=self.largest).indices)  # of equal ones HF PEFT's choice

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.values)
        if self.A is not None and self.B is not None:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)

    def places(self) -> Tensor:
        return self.indices.long()

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._drops(x):
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self._drops(x) or self.A is None or self.B is None:
            return super().delta(x)
        low_rank = self.site.expand(self.site.project(F.dropout(x, self.dropout), self.A), self.B)
        return self.site.apply(x, self.sparse_delta(slice(None))) + self.scale * low_rank

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        V, back_sparse = super().changed(W, rows)
        A, B = self.A, self.B
        if A is None or B is None:
            return V, back_sparse

        def back(dD: Tensor, gradients: Gradients) -> None:
            back_sparse(dD, gradients)
            gradients[A].addmm_(B.T, dD, alpha=self.scale)
            gradients[B].addmm_(dD, A.T, alpha=self.scale)

        return V.addmm_(B, A, alpha=self.scale), back

    def pull(self, back: Pullback, dy: Tensor, x: Tensor, dtype: torch.dtype, gradients: Gradients) -> None:
        super().pull(back, dy, x, dtype, gradients)
        if self.A is not None and self.B is not None and self.pulls_few(dy):  # else `back` has done it
            gradients[self.A].addmm_((dy @ self.B).T, x, alpha=self.scale)
            gradients[self.B].addmm_(dy.T, x @ self.A.T, alpha=self.scale)

    def weight_delta(self, rows: slice) -> Tensor:
        if self.A is None or self.B is None:
            return self.sparse_delta(rows)
        if self.site.linear.stack == 1:
            return self.sparse_delta(rows) + self.scale * self.B[rows] @ self.A
        return self.sparse_delta(rows) + (self.scale * stacked_product(self.B, self.A, self.site.linear.stack))[rows]

    def _drops(self, x: Tensor) -> bool:
        return self.A is not None and self.training and self.dropout > 0 and x.is_floating_point()
