"""MiSS: one small matrix, shared by all shards of a weight.  Kang and Yin 2024, arXiv:2409.15371, section 3.

    y' = W x + b + D^T sum_k x_k          W' = W + (D^T, D^T, ..., D^T)          x_k: the k-th R of the inputs

D: (R, O)   R = rank.   The last shard may be shorter.   Two variants:
    mini    D repeats too: (R, M), for every M of the outputs
    bat     W'_pk = W_pk + (W_pk + I) D_p      W_pk: (R, R), p-th of the outputs, k-th of the inputs   D: (O / R, R, R)
D starts at zero, so training starts from the base model.   Trainable parameters: R O per site; R M; bat also R O.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.checks import require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site


@method("miss")
@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """A shared shard.

    rank: R, the width of a shard.   variant: see above.   mini_rank: M, of "mini".
    dropout: on the input of what is added, while training; "bat" has none.
    """

    rank: int = 64
    variant: Literal["miss", "bat", "mini"] = "miss"
    mini_rank: int = 1
    dropout: float = 0.0

    summary = "y' = W x + b + D^T sum_k x_k, the shards of x"
    paper = "Kang and Yin 2024, arXiv:2409.15371"
    disk = DiskNames(
        "MISS",
        fields={"rank": "r", "variant": "init_weights", "mini_rank": "mini_r", "dropout": "miss_dropout"},
        tensors={"D": "miss_block"},
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank", "mini_rank")
        require_one_of(self, "variant", ("miss", "bat", "mini"))
        require_share(self, "dropout")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.rank > site.fan_in:
            return f"its {site.fan_in} inputs make no shard of {self.rank}; say a smaller rank"
        if self.variant == "mini" and site.fan_out % self.mini_rank:
            return f"its {site.fan_out} outputs are no multiple of mini_rank {self.mini_rank}"
        if self.variant == "bat" and (site.fan_in % self.rank or site.fan_out % self.rank):
            return f"its {site.fan_out} x {site.fan_in} weight does not divide into {self.rank} x {self.rank} blocks"
        if self.variant == "bat" and not site.storage.readable:
            return f"its weight is held as {site.storage.name}; bat has to read it"
        return None

    def build(self, site: Site) -> Adapter:
        return BatAdapter(self, site) if self.variant == "bat" else MiSSAdapter(self, site)


class MiSSAdapter(LowRankAdapter):
    """D at one site.  Stacked experts have theirs one beside the other."""

    def __init__(self, method: MiSS, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        outputs = site.linear.stack * site.fan_out
        self.D = site.empty(method.rank, method.mini_rank if method.variant == "mini" else outputs)
        self.repeats = outputs // self.D.shape[1]
        self.thin = isinstance(site.kind, LinearKind)
        self.plain &= not self.thin  # nothing is fused: summing shards is cheaper than a product

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.D)

    def delta(self, x: Tensor) -> Tensor:
        if not self.thin:
            return super().delta(x)
        rank = len(self.D)
        shards = F.pad(self.dropped(x), (0, -x.shape[-1] % rank)).reshape(*x.shape[:-1], -1, rank)
        return F.linear(shards.sum(-2), self._expand().to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        rank, I = len(self.D), self.site.fan_in
        sums = torch.eye(rank, dtype=self.D.dtype, device=self.D.device).repeat(self.site.linear.stack, -(-I // rank))
        return sums[:, :I], self._expand()

    def _expand(self) -> Tensor:
        """(O, R)."""
        return self.D.T.repeat(self.repeats, 1) if self.repeats > 1 else self.D.T


class BatAdapter(FullWeightAdapter):
    """D at one site: a block for each R of the outputs."""

    in_blocks = False

    def __init__(self, method: MiSS, site: Site) -> None:
        super().__init__(site)
        self.D = site.empty(site.linear.stack * site.fan_out // method.rank, method.rank, method.rank)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.D)

    def weight_delta(self, rows: slice) -> Tensor:
        blocks, rank, _ = self.D.shape
        W = self.site.weight().to(self.D.dtype)  # (O, I)
        change = torch.bmm(W.reshape(blocks, -1, rank), self.D).view(blocks, rank, -1, rank)  # (p, row, k, column)
        return (change + self.D[:, :, None]).view(W.shape)[rows]
