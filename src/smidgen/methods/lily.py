"""Lily: low-rank changes whose halves layers share, mixed by a router.  Zhong et al. 2024, arXiv:2407.09946.

    y' = y + s (sum_e p_e B_e) A x          p = mean over tokens of softmax(G A x)

A: (R, I), one for `stride` sites in a row   B_e: (O, R), e = 1 .. E, the same for all sites of a kind   G: (E, R), each
site's own.   Sites are of a kind if their names end alike and their weights have one shape.   B starts at zero, so
training starts from the base model.
Trainable parameters: E R for each site, R I for every `stride` sites of a kind, E R O for each kind.

The tokens are those of one row of the batch: what a row gives does not depend on its neighbours.  The authors' code and
Hugging Face PEFT average over the whole batch, which is the same for a batch of one.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter
from ..core.checks import require_finite, require_whole
from ..core.disk_names import DiskNames
from ..core.method import Method, Shared, method
from ..core.site import Site


@method("lily")
@dataclass(frozen=True, kw_only=True)
class Lily(Method):
    """Low-rank changes shared across layers.

    rank: R; two to four times LoRA's.   stride: so many sites of a kind in a row share A.   experts: E, at least 2.
    scale: s.   kinds: ends of paths, sites with the same one being of a kind; by default their last names.
    """

    rank: int = 32
    stride: int = 1
    experts: int = 2
    scale: float = 1.0
    kinds: tuple[str, ...] = ()

    summary = "y' = y + s (sum_e p_e B_e) A x, A and B shared across layers"
    paper = "Zhong et al. 2024, arXiv:2407.09946"
    on_linear_calls = True
    disk = DiskNames(
        "LILY",
        fields={"rank": "r", "stride": "stride_A", "experts": "num_B", "scale": "scaling"},
        tensors={"router": "lily_router.weight"},
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank", "stride")
        require_whole(self, "experts", least=2)
        require_finite(self, "scale")

    def kind_of(self, site: Site) -> tuple[str, int, int]:
        """What sites that share have in common: the end of their paths, O and I."""
        ends = [end for end in self.kinds if site.path.endswith(end)]
        return max(ends, key=len) if ends else site.path.rpartition(".")[2], site.fan_out, site.fan_in

    def shared(self, sites: tuple[Site, ...]) -> "Halves":
        return Halves(self, sites)

    def build(self, site: Site) -> "LilyAdapter":
        return LilyAdapter(self, site)


class Halves(Shared):
    """All A (R, I), and the B of each kind (E R, O); which: of each site by name, its A and its B."""

    def __init__(self, method: Lily, sites: Sequence[Site]) -> None:
        super().__init__()
        self.A, self.B, self.which = nn.ParameterList(), nn.ParameterList(), dict[str, tuple[int, int]]()
        seen, kinds = Counter[tuple[str, int, int]](), dict[tuple[str, int, int], int]()
        last: dict[int, int] = {}  # of each kind, the newest A
        for site in sites:
            kind = method.kind_of(site)
            if kind not in kinds:
                kinds[kind] = len(self.B)
                self.B.append(site.empty(method.experts * method.rank, site.fan_out))
            if seen[kind] % method.stride == 0:
                last[kinds[kind]] = len(self.A)
                self.A.append(site.empty(method.rank, site.fan_in))
            seen[kind] += 1
            self.which[site.name] = last[kinds[kind]], kinds[kind]

    def reset(self, generator: torch.Generator | None) -> None:
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        for B in self.B:
            nn.init.zeros_(B)


class LilyAdapter(AdditiveAdapter):
    """G at one site."""

    mergeable = False  # what is added depends on the tokens
    shared: Halves

    def __init__(self, method: Lily, site: Site) -> None:
        super().__init__(site)
        self.scale, self.which = method.scale, (0, 0)
        self.router = site.empty(method.experts, method.rank)

    def prepare(self) -> None:
        self.which = self.shared.which[self.site.name]

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5), generator=generator)

    def delta(self, x: Tensor) -> Tensor:
        a, b = self.which
        A, B = self.shared.A[a].to(self.router.device), self.shared.B[b].to(self.router.device)
        h = self.site.project(x, A)  # (rows, ..., R)
        by_row = h.reshape(h.shape[0], -1, h.shape[-1])  # (rows, tokens, R)
        p = (by_row @ self.router.to(h.dtype).T).softmax(-1).mean(1)  # (rows, E)
        mixed = (p @ B.to(h.dtype).view(p.shape[1], -1)).view(len(p), *h.shape[-1:], -1)  # (rows, R, O)
        return torch.bmm(by_row, mixed).view(*h.shape[:-1], -1) * self.scale
