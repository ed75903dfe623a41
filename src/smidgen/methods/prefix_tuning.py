"""Prefix tuning: learned keys and values in front of every attention's own.  Li & Liang 2021, arXiv:2101.00190, section
4; for encoders and without the MLP: P-tuning v2, Liu et al. 2021, arXiv:2110.07602.

    softmax(q [K; k]^T / sqrt(d)) [V; v]        K: (N, Dk)   V: (N, Dv)
    [K V] = tanh(E W^T + b) U^T + c             E: (N, Dk)   W: (M, Dk)   U: (Dk + Dv, M)   reparametrised, section 4.3

N = length, D = key/value heads x head width, M = reparametrisation; all sites share E, W and b.  Keys and values are
learned as they act: no position is applied to them, and real tokens stay at the positions they had.  Relative position
biases (T5) are zero towards them.
Trainable parameters: N (Dk + Dv) per site; reparametrised N Dk + M (Dk + 1) once and (M + 1) (Dk + Dv) per site.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attention import Front, widths_of
from ..core.checks import require_above_zero, require_whole
from ..core.disk_names import DiskNames
from ..core.method import Shared, method
from ..core.prefixes import PositionsAdapter, PrefixAdapter, PrefixMethod
from ..core.site import Site


@method("prefix_tuning")
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Learned keys and values in front of every attention: of encoders, decoders and between the two.

    A fresh prefix is not the base model: whatever stands in front takes a share of the attention.

    length: N, positions in front; 10 to 200 is usual, more for generation than for classification.
    reparametrisation: M, the width of the paper's MLP that the prefix is computed by while it is trained; it steadies
        training where the learning rate is high.  None learns K and V directly, as P-tuning v2 does.
    init_std: standard deviation of the random start, of K and V or of the MLP's last layer.  A model's own keys and
        values are often of size 0.5 to 1; a prefix that starts far below is ignored for long.
    shift_positions: count positions of real tokens from N on, as Hugging Face PEFT does, whose prefix sits in the
        cache.  Its folders need it; otherwise it only costs room.
    """

    length: int = 16
    reparametrisation: int | None = None
    init_std: float = 0.02
    shift_positions: bool = False

    summary = "softmax(q [K; k]^T) [V; v]"
    paper = "Li & Liang 2021, arXiv:2101.00190"
    disk = DiskNames("PREFIX_TUNING", fields={"length": "num_virtual_tokens"})

    def check(self) -> None:
        require_whole(self, "length", "reparametrisation")
        require_above_zero(self, "init_std")

    def build(self, site: Site) -> Adapter:
        if self.shift_positions and not site.path:
            return PositionsAdapter(self.length, site)
        return KeysAndValues(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Reparametrisation | None":
        return (
            None if self.reparametrisation is None else Reparametrisation(self.length, self.reparametrisation, sites[0])
        )


class KeysAndValues(PrefixAdapter):
    """K (N, Dk) and V (N, Dv); or the MLP's last layer that gives both."""

    def __init__(self, method: PrefixTuning, site: Site) -> None:
        super().__init__(site)
        self.std, self.learned_directly = method.init_std, method.reparametrisation is None
        if method.reparametrisation is None:
            self.K = site.empty(method.length, self.widths[0])
            self.V = site.empty(method.length, self.widths[1])
        else:
            self.weight = site.empty(sum(self.widths), method.reparametrisation)
            self.bias = site.empty(sum(self.widths))

    def reset(self, generator: torch.Generator | None) -> None:
        if self.learned_directly:
            nn.init.normal_(self.K, std=self.std, generator=generator)
            nn.init.normal_(self.V, std=self.std, generator=generator)
        else:
            nn.init.normal_(self.weight, std=self.std, generator=generator)
            nn.init.zeros_(self.bias)

    def front(self) -> Front:
        if self.learned_directly:
            return self.K, self.V
        both = F.linear(self.shared(), self.weight, self.bias)
        return both[:, : self.widths[0]], both[:, self.widths[0] :]


class Reparametrisation(Shared):
    """What all sites' MLPs have in common: the embedding E (N, Dk) and the first layer, W (M, Dk) and b (M,)."""

    def __init__(self, length: int, width: int, site: Site) -> None:
        super().__init__()
        widths = widths_of(site.layer)
        assert widths is not None, f"{site.name} was not accepted"
        self.embedding = site.empty(length, widths[0])
        self.weight = site.empty(width, widths[0])
        self.bias = site.empty(width)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.embedding, generator=generator)
        bound = self.weight.shape[1] ** -0.5  # nn.Linear's own start
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self) -> Tensor:
        """(N, M)"""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))
