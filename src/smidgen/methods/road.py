"""RoAd: turn and scale pairs of a layer's outputs.  Liao and Monz 2024, arXiv:2409.00119, equations 3 and 4.

    y' = R (W x + b)        W' = R W    b' = R b        R of a pair:  | a1 cos t1   -a2 sin t2 |
                                                                      | a3 sin t3    a4 cos t4 |
a, t: the scales and angles.   RoAd_1: one of each per pair; RoAd_2: one per output; RoAd_4: one per entry of R.
Outputs are taken in groups of `group_size`, and each of a group's first half makes a pair with one of its second half.
a starts at 1 and t at 0, so training starts from the base model.   Trainable parameters: O, 2 O or 4 O per site.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.checks import require_one_of
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import ConvKind
from ..core.method import Method, method
from ..core.site import Site

_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}  # angles


@method("road")
@dataclass(frozen=True, kw_only=True)
class RoAd(Method):
    """Rotations of pairs of outputs.

    variant: how many angles and scales.   group_size: even, and a divisor of O; it only says who makes a pair.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64

    summary = "y' = R (W x + b), R turns and scales pairs"
    paper = "Liao and Monz 2024, arXiv:2409.00119"
    disk = DiskNames("ROAD", tensors={"theta": "road_theta", "alpha": "road_alpha"}, kinds=("linear",))

    def check(self) -> None:
        require_one_of(self, "variant", _PER_OUTPUT)
        require(
            self.group_size > 0 and self.group_size % 2 == 0,
            f"group_size is {self.group_size}; half a group pairs with the other half, so it is even",
        )

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if site.fan_out % self.group_size:
            return f"its {site.fan_out} outputs do not divide into groups of {self.group_size}; say another group_size"
        groups = cast(nn.Conv2d, site.layer).groups if isinstance(site.kind, ConvKind) else 1
        if site.fan_out // groups % self.group_size:
            return f"outputs of its {groups} groups read different inputs, so none pairs with another's"
        return None

    def build(self, site: Site) -> "RoAdAdapter":
        return RoAdAdapter(self, site)


class RoAdAdapter(Adapter):
    """The angles theta and scales alpha at one site."""

    in_blocks = False  # rows of W are turned into each other

    def __init__(self, method: RoAd, site: Site) -> None:
        super().__init__(site)
        self.variant = method.variant
        self.reach = method.group_size // 2  # from an output to its partner
        count = int(_PER_OUTPUT[method.variant] * site.linear.stack * site.fan_out)
        self.theta, self.alpha = site.empty(count), site.empty(count)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.theta)
        nn.init.ones_(self.alpha)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        own, other = self._factors()
        own, other = self.site.channels(own - 1, y), self.site.channels(other, y)
        return torch.addcmul(torch.addcmul(y, y, own), self._swapped(y, y.ndim - own.ndim), other)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        own, other = (factor.to(W.dtype) for factor in self._factors())
        W = W * own[:, None] + self._swapped(W, 0) * other[:, None]
        return W, None if b is None else b * own + self._swapped(b, 0) * other

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(O,) and (O,): each output's factor of itself, and of its partner's turned value."""
        if self.variant == "road_4":  # of each group first its own, then its partner's
            theta, alpha = (v.view(-1, 2, 2 * self.reach) for v in (self.theta, self.alpha))
            own, other = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
            return own.flatten(), other.flatten()
        own, other = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        if self.variant == "road_1":  # both of a pair have the same
            own, other = (v.view(-1, 1, self.reach).expand(-1, 2, -1).flatten() for v in (own, other))
        return own, other

    def _swapped(self, y: Tensor, dim: int) -> Tensor:
        """Each pair (y1, y2) along `dim` as (-y2, y1)."""
        first, second = y.reshape(*y.shape[:dim], -1, 2, self.reach, *y.shape[dim + 1 :]).unbind(dim + 1)
        return torch.stack((-second, first), dim + 1).reshape(y.shape)
