"""Diff pruning: learn which few entries of a weight to change.  Guo et al. 2020, arXiv:2012.07463.

    W' = W + z * d        z = min(1, max(0, 3 sigmoid(a + log u - log(1 - u)) - 1.5))        penalty l sum sigmoid(a)

d, a: (O, I), difference and gates.   u: (O, I), uniform on (0, 1), drawn in every training step; else u = 1/2.
O, I = fan-out, fan-in.   The penalty is the expected number of entries that are not zero.  With `structured` a gate of
the whole weight multiplies z, and its probability the penalty.   d starts at zero, so training starts from the base
model.   When a share of the steps is done, the `budget` of all entries with the largest |z d| stays, and only these are
trained on; a saved adapter then holds them and their places.
Trainable parameters: 2 O I per site at first; memory is that of full fine-tuning, twice, and z.  Saved: budget * O I.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, AdditiveAdapter, Call
from ..core.checks import require_finite
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, require
from ..core.full_weight import FullWeightAdapter
from ..core.layers import LinearKind
from ..core.method import Method, method
from ..core.products import linear, times
from ..core.site import Site
from ..core.sparse import SparseAdapter, check_places, matrix_shape

_DECIDED = 100.0  # a gate this far from 0 is open or shut whatever is drawn, and gets no gradient any more


@method("diff_pruning")
@dataclass(frozen=True, kw_only=True)
class DiffPruning(Method):
    """A sparse difference whose places are learned; `AdapterSet.follow` lets it see the steps.

    budget: share of the entries that are kept.   prune_after: share of the steps after which the others go.
    l0_weight: l, of the penalty.   gate_start: a at the start; 5 is open.   structured: gate whole weights too.
    """

    budget: float = 0.005
    prune_after: float = 0.7
    l0_weight: float = 1.25e-7
    gate_start: float = 5.0
    structured: bool = False
    kept: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # of a saved one: its places

    summary = "W' = W + z * d, z learned and mostly zero"
    paper = "Guo et al. 2020, arXiv:2012.07463"
    disk = DiskNames("SMIDGEN_DIFF_PRUNING")

    def check(self) -> None:
        require(0 < self.budget <= 1, f"budget is {self.budget}; it is a share above 0 and at most 1, such as 0.005")
        require(0 <= self.prune_after <= 1, f"prune_after is {self.prune_after}; it is a share of the steps, 0 to 1")
        require(self.l0_weight >= 0, f"l0_weight is {self.l0_weight}; it must be at least 0")
        require_finite(self, "gate_start")

    @property
    def learns_places(self) -> bool:
        """True if entries are to go; else this is a plain difference of the whole weight."""
        return not self.kept and (self.budget < 1 or self.l0_weight > 0)

    def accepts(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "its gates are drawn in a layer's call, and here no layer is called"
        return super().accepts(site)

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "kept"}

    def build(self, site: Site) -> Adapter:
        return Pruned(site, self.kept[site.name]) if site.name in self.kept else DiffPruningAdapter(self, site)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        ours = [adapter for adapter in adapters.values() if isinstance(adapter, DiffPruningAdapter)]
        if not ours or not self.l0_weight:
            return None
        return self.l0_weight * torch.stack([adapter.expected_entries() for adapter in ours]).sum()

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        ours = [adapter for adapter in adapters.values() if isinstance(adapter, DiffPruningAdapter)]
        if self.budget == 1 or not ours or step != max(1, int(self.prune_after * steps)):
            return
        changes = [(adapter.gates(draw=False) * adapter.difference).flatten() for adapter in ours]
        magnitudes = torch.cat([change.abs().cpu() for change in changes])
        kept = torch.zeros(len(magnitudes), dtype=torch.bool)
        kept[magnitudes.topk(max(1, int(self.budget * len(magnitudes)))).indices] = True
        for adapter, change, mask in zip(ours, changes, torch.split(kept, [len(c) for c in changes]), strict=True):
            adapter.prune(change, mask.to(change.device))

    def at_rest(
        self, tensors: Mapping[Site, Mapping[str, Tensor]]
    ) -> tuple[Method, Mapping[Site, Mapping[str, Tensor]]]:
        if not all("gate" in held and bool((held["gate"].abs() >= _DECIDED / 2).all()) for held in tensors.values()):
            return self, tensors  # not pruned yet, or read from such a folder
        places, small = {}, {}
        for site, held in tensors.items():
            found = (held["gate"].flatten() > 0).nonzero()[:, 0]
            found = found if len(found) else found.new_zeros(1)  # no site is empty
            places[site.name] = found.to(torch.int32)
            small[site] = {"indices": places[site.name], "values": held["difference"].flatten()[found]}
        return replace(self, kept=places), small

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> Method:
        held = {site: named["indices"] for site, named in tensors.items() if "indices" in named}
        for site, indices in held.items():
            check_places(indices, site)
        return replace(self, kept={site.name: indices for site, indices in held.items()})


class DiffPruningAdapter(FullWeightAdapter):
    """d and a at one site, and the gate of the whole weight (1,) where there is one."""

    def __init__(self, method: DiffPruning, site: Site) -> None:
        super().__init__(site)
        self.learns_places, self.gate_start = method.learns_places, method.gate_start
        self.difference, self.gate = site.empty(*matrix_shape(site)), site.empty(*matrix_shape(site))
        self.group_gate = site.empty(1) if method.structured else None

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.difference)
        for gate in (self.gate, self.group_gate):
            if gate is not None:
                nn.init.constant_(gate, self.gate_start)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.learns_places and self.training and torch.is_grad_enabled() and not self.followed:
            raise ConfigError(
                "diff pruning chooses its entries while it trains, and nothing tells it of the steps. Before the "
                "first: adapters.follow(optimizer, steps=...)"
            )
        is_linear = isinstance(self.site.kind, LinearKind)
        return (FullWeightAdapter if is_linear else AdditiveAdapter).forward(self, call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if isinstance(self.site.kind, LinearKind):
            return super().delta(x)
        return self.site.apply(x, self.gates(draw=self._draws) * self.difference)

    def _linear(self, x: Tensor, W: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
            D = self.gates(draw=self._draws) * self.difference
            return F.linear(x, D.to(x.dtype) if W is None else W + D, b)
        with torch.no_grad():
            z = _hard_concrete(self.gate, self._draws)
        d: Tensor = self.difference
        if self.group_gate is not None:
            d = d * _hard_concrete(self.group_gate, self._draws)
        result: Tensor = _GatedLinear.apply(x, W, b, d, self.gate, z)  # type: ignore[no-untyped-call]
        return result

    @property
    def _draws(self) -> bool:
        return self.learns_places and self.training

    def weight_delta(self, rows: slice) -> Tensor:
        return (self.gates(draw=False) * self.difference)[rows]

    def gates(self, *, draw: bool) -> Tensor:
        """z (O, I)."""
        z = _hard_concrete(self.gate, draw)
        return z if self.group_gate is None else z * _hard_concrete(self.group_gate, draw)

    def expected_entries(self) -> Tensor:
        """How many entries are not zero, on average."""
        count = self.gate.sigmoid().sum()
        return count if self.group_gate is None else count * self.group_gate.sigmoid().sum()

    def prune(self, change: Tensor, kept: Tensor) -> None:
        """Keep of the change (O I,) these entries, for good."""
        self.difference.copy_((change * kept).view_as(self.difference))
        self.gate.copy_(torch.where(kept, _DECIDED, -_DECIDED).view_as(self.gate))
        if self.group_gate is not None:
            self.group_gate.fill_(_DECIDED)


class Pruned(SparseAdapter):
    """The entries that were kept at one site, and their flat places (n,)."""

    indices: Tensor

    def __init__(self, site: Site, places: Tensor) -> None:
        super().__init__(site)
        self.values = site.empty(len(places))
        self.given = places
        self.register_buffer("indices", torch.empty(len(places), dtype=torch.int32, device=self.values.device))

    def prepare(self) -> None:
        self.indices.copy_(self.given)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.values)

    def places(self) -> Tensor:
        return self.indices.long()


class _GatedLinear(torch.autograd.Function):
    """y = x (W + z * d)^T + b, or x (z * d)^T, z of the gates a as drawn.   Kept beside x: z.

    dD = dy^T x   (O, I)       dd = z * dD       da = d * dD * dz/da
    Where 0 < z < 1, z = 3 p - 1.5 of the sigmoid p, so that dz/da = 3 p (1 - p) = 3/4 - z^2 / 3; elsewhere it is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, d: Tensor, a: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, d, z)
        return linear(x, _GatedLinear._weight(x, W, d, z), b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W, d, z = ctx.saved_tensors
        x_rows, dy_rows, dx = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), None
        if ctx.needs_input_grad[0]:
            dx = times(dy_rows, _GatedLinear._weight(x, W, d, z)).view(x.shape)
        dD = torch.mm(dy_rows.T, x_rows).to(d.dtype)
        slope = z.square().div_(-3).add_(0.75).mul_((z > 0) & (z < 1))
        return dx, None, None, z * dD, dD.mul_(d).mul_(slope), None

    @staticmethod
    def _weight(x: Tensor, W: Tensor | None, d: Tensor, z: Tensor) -> Tensor:
        return (z * d).to(x.dtype) if W is None else torch.addcmul(W, z, d)


def _hard_concrete(a: Tensor, draw: bool) -> Tensor:
    """Louizos et al. 2017, arXiv:1712.01312, stretched to (-1.5, 1.5)."""
    if draw:
        a = torch.rand_like(a).logit_(eps=1e-6).add_(a)  # log u - log(1 - u) + a
    return (3 * a.sigmoid() - 1.5).clamp(0, 1)
