"""LoReFT: steer hidden states within a learned low-rank subspace.  Wu et al. 2024, arXiv:2404.03592, equation 2.

    h' = h + R^T (f(W h + b) - R h)         R R^T = 1

R, W: (r, D)   b: (r,)   D = features, r = rank.   f: nothing in the paper.   h: what a block gives, at a few tokens.
R comes of a free matrix P, whose rows are made orthonormal: R = L^-1 P, L L^T = P P^T (Gram and Schmidt's way).
W starts at R and b at zero, so training starts from the base model; the authors start W at random, which does not, nor
does an f.   Trainable parameters: 2 r D + r per block, twice that where first and last tokens have their own.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.blocks import blocks, not_recognised, output_width
from ..core.checks import require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, TargetError
from ..core.layers import EmbeddingKind, LinearKind
from ..core.method import Method, method
from ..core.non_linearity import FUNCTIONS, NonLinearity
from ..core.positions import Reader, Reading, add_at, first_and_last, is_reader, readers_above
from ..core.site import Site
from ..core.targets import Resolution


@dataclass(frozen=True, kw_only=True)
class ReFT(Method):
    """What LoReFT, NoReFT and DiReFT have in common.  By default after every block.

    rank: r; 1 to 8 is usual.
    positions: which tokens of a prompt: "f1+l1" the first and the last, "f7+l7", "f3", "l1", or "all" tokens.
    share_weights: the first and the last tokens use the same parameters.
    dropout: probability of dropping a feature of a changed state, all of it, while training, as in the authors' code.
    non_linearity: f, or None.
    """

    rank: int = 4
    positions: str = "f1+l1"
    share_weights: bool = False
    dropout: float = 0.0
    non_linearity: NonLinearity | None = None

    unit: "ClassVar[type[Unit]]"
    paper = "Wu et al. 2024, arXiv:2404.03592"

    def check(self) -> None:
        require_whole(self, "rank")
        require_share(self, "dropout")
        require_one_of(self, "non_linearity", FUNCTIONS)
        try:
            first_and_last(self.positions)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def accepts(self, site: Site) -> str | None:
        name = type(site.layer).__name__
        if site.parameter is not None:
            return f"{self.name} changes what a module gives, not a parameter; name a block"
        if is_reader(site):
            return None
        if site.kind is not None and not isinstance(site.kind, LinearKind | EmbeddingKind):
            return f"{name} gives no hidden states, features last; name a block, or a linear layer in it"
        width = site.fan_out if site.kind else output_width(site.layer)
        if width is None:
            return f"how many features {name} gives cannot be told; name the last layer in it"
        if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in site.layer.modules()):
            return f"{name} gives (tokens, rows, features); make it with batch_first=True"
        if width < self.rank:
            return f"it has {width} features; rank is {self.rank}"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        found = blocks(model)
        if not found:
            raise not_recognised(model, "block", f'{type(self).__name__}(targets=["*.fc2"])')
        return found, {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        wrong = [site.name or "the model" for site in found.sites if is_reader(site)]
        if wrong:
            raise TargetError(f"{', '.join(wrong)}: a whole model has no place for {self.name}. Name blocks of it")
        if first_and_last(self.positions) is None:
            return found
        readers = readers_above(model, [site.path for site in found.sites])
        return Resolution(model, (*found.sites, *readers), found.passed_over)

    def build(self, site: Site) -> Adapter:
        return Reader(site) if is_reader(site) else ReFTAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Reading | None":
        return None if first_and_last(self.positions) is None else Reading(sites)


class Unit(nn.Module):
    """The change of states h (..., D): P^T (f(W h + b) - P h), with P as it is; or without the difference."""

    subtracts: ClassVar[bool] = True

    def __init__(self, method: ReFT, site: Site, width: int) -> None:
        super().__init__()
        self.f = None if method.non_linearity is None else FUNCTIONS[method.non_linearity]
        self.P, self.W = site.empty(method.rank, width), site.empty(method.rank, width)
        self.b = site.empty(method.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        """P with random orthonormal rows, and W so that nothing changes where f is nothing."""
        nn.init.orthogonal_(self.P, generator=generator)
        nn.init.zeros_(self.b)
        if self.subtracts:
            self.W.copy_(self.projection())
        else:
            nn.init.zeros_(self.W)

    def projection(self) -> Tensor:
        """What stands at the outside, (r, D)."""
        return self.P

    def forward(self, h: Tensor) -> Tensor:
        P, b = self.projection(), self.b.to(h.dtype)
        if self.f is None:  # W h - P h in one
            inside = F.linear(h, (self.W - P if self.subtracts else self.W).to(h.dtype), b)
        else:
            inside = self.f(F.linear(h, self.W.to(h.dtype), b))
            inside = inside - F.linear(h, P.to(h.dtype)) if self.subtracts else inside
        return F.linear(inside, P.T.to(h.dtype))


class ReFTAdapter(Adapter):
    """At one block: units `first` and `last`, or `every` where all tokens that it acts on use the same."""

    by_row = mergeable = False
    shared: Reading

    def __init__(self, method: ReFT, site: Site) -> None:
        super().__init__(site)
        self.dropout, self.places = method.dropout, first_and_last(method.positions)
        self.starts_as_base = method.non_linearity is None or not method.unit.subtracts  # type: ignore[misc]
        width = site.fan_out if site.kind else cast(int, output_width(site.layer))
        apart = self.places is not None and all(self.places) and not method.share_weights
        for name in ("first", "last") if apart else ("every",):
            self.add_module(name, method.unit(method, site, width))
        self.reader: str | None = None

    def prepare(self) -> None:
        if self.places is not None:
            self.reader = self.shared.reader_of[self.site.path]

    def reset(self, generator: torch.Generator | None) -> None:
        for unit in self.children():
            cast(Unit, unit).reset(generator)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out  # a block's first output is the hidden state
        if self.places is None:
            y = y + self.change(y, False)
        else:
            seen = self.shared.seen.get(self.reader, True) if self.reader is not None else True
            y = add_at(y, *self.places, seen, self.change)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def change(self, h: Tensor, is_last: bool) -> Tensor:
        """What is added to states (B, n, D) of the first or last tokens."""
        unit = self._modules.get("every") or self._modules["last" if is_last else "first"]
        change = cast(Unit, unit)(h)
        if self.training and self.dropout:
            change = F.dropout(h + change, self.dropout) - h
        return cast(Tensor, change.to(h.dtype))


class RotatedUnit(Unit):
    """P with its rows made orthonormal: R."""

    def projection(self) -> Tensor:
        L = torch.linalg.cholesky(self.P @ self.P.T)
        R: Tensor = torch.linalg.solve_triangular(L, self.P, upper=False)
        return R


@method("loreft")
@dataclass(frozen=True, kw_only=True)
class LoReFT(ReFT):
    """Low-rank linear subspace representation fine-tuning.  Learns with rates of 1e-3 to 1e-2."""

    unit: ClassVar[type[Unit]] = RotatedUnit
    summary = "h' = h + R^T (W h + b - R h) at a few tokens"
    disk = DiskNames("SMIDGEN_LOREFT")
