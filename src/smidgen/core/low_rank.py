"""LowRankAdapter: what all methods share whose change of a weight is a product of two thin matrices.

    y' = y + s (m x) A^T B^T            W' = W + s B A            A: (R, I)   B: (O, R)   m: dropout's mask

A method says what A and B are: its own parameters, or what it computes of them.  The product is formed for convolutions
alone, whose weights are few beside what goes through them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import AdditiveAdapter, Call
from .kernels import frozen_linear_low_rank, frozen_linear_low_rank_of_made
from .layers import ConvKind, LinearKind
from .quantised_linear import QuantisedLinear, is_quantised_linear, quantised_linear, quantised_linear_of_made
from .site import Site

_FEW = 0.1  # share of entries up to which places take less than a byte for each entry


class LowRankAdapter(AdditiveAdapter):
    """A subclass has `factors`, and the parameters that they come from.

    scale: s.   dropout: probability of dropping an entry of the input while training.   dropout_on: "elements" draws a
    mask per entry, "features" one per input feature and call.
    On stacked experts every expert has its own factors: A (E R, I), B (E O, R).
    """

    def __init__(
        self,
        site: Site,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        dropout_on: Literal["elements", "features"] = "elements",
    ) -> None:
        super().__init__(site)
        self.scale, self.dropout, self.dropout_on = scale, dropout, dropout_on
        self.plain = site.storage.plain or isinstance(site.layer, QuantisedLinear)
        self._fuses = type(self).fused is LowRankAdapter.fused

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), differentiable, in fp32 or better."""
        raise NotImplementedError

    @property
    def by_factors(self) -> bool:
        """True if `factors`, `scale` and dropout say all that happens here: then mixed rows can be run from them."""
        return self.runs_as(LowRankAdapter)

    def runs_as(self, known: "type[LowRankAdapter]") -> bool:
        """True on a linear layer, if no subclass of `known` has a `forward` or `delta` of its own."""
        own = type(self)
        return isinstance(self.site.kind, LinearKind) and (own.forward, own.delta) == (known.forward, known.delta)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fuses(call):
            return self.fused(x, self.site.stored, self.site.bias, *self._scale_and_mask(x))
        if self._fuses_quantised(call):
            return quantised_linear(x, self._quantised, *self.factors(), *self._scale_and_mask(x))
        if self.plain and takes_change(self.site, call, x) and not (self.training and self.dropout):
            return with_change(self.site, x, self.weight_delta(slice(None)))
        return super().forward(call, x, *args, **kwargs)

    def fuses(self, call: Call) -> bool:
        """True where the call is a bare frozen Linear's with nothing around it: one fused pass."""
        return self.plain and is_bare_linear(call) and is_frozen(self.site)

    def _fuses_quantised(self, call: Call) -> bool:
        """The same of a layer in few bits."""
        return self.plain and is_quantised_linear(call) and self._fuses

    @property
    def _quantised(self) -> QuantisedLinear:
        return cast(QuantisedLinear, self.site.layer)

    def of_made(self, call: Call, make: Callable[..., Tensor], made_of: Sequence[Tensor]) -> Tensor | None:
        """What `forward` gives for x = make(*made_of), of their shape, with x kept by nobody; None where it cannot."""
        same = type(self).forward is LowRankAdapter.forward and self._fuses
        if not same or torch.is_autocast_enabled(made_of[0].device.type):
            return None
        is_quantised = self._fuses_quantised(call)
        if not (is_quantised or self.fuses(call)):
            return None
        A, B = self.factors()
        scale, mask = self._scale_and_mask(made_of[0])
        if is_quantised:
            return quantised_linear_of_made(make, made_of, self._quantised, A, B, scale, mask)
        return frozen_linear_low_rank_of_made(make, made_of, self.site.stored, self.site.bias, A, B, scale, mask)

    def _scale_and_mask(self, x: Tensor) -> tuple[float, Tensor | None]:
        if not (self.training and self.dropout):
            return self.scale, None
        return self.scale / (1 - self.dropout), self._drawn(x)

    def fused(self, x: Tensor, W: Tensor, b: Tensor | None, scale: float, mask: Tensor | None) -> Tensor:
        """The layer and the change in one, where the layer is a frozen linear one."""
        A, B = self.factors()
        return frozen_linear_low_rank(x, W, b, A, B, scale, mask)

    def delta(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        return self.site.expand(self.site.project(self.dropped(x), A), B) * self.scale

    def of_base(self, x: Tensor) -> Tensor:
        """What the layer itself gives for x, without its bias."""
        if isinstance(self.site.layer, QuantisedLinear):
            return quantised_linear(x, self.site.layer, with_bias=False)
        return self.site.apply(x, self.site.weight())

    def dropped(self, x: Tensor) -> Tensor:
        """The layer's input as dropout leaves it."""
        if not (self.training and self.dropout and x.is_floating_point()):  # an embedding's input is indices
            return x
        if self.dropout_on == "elements":
            return F.dropout(x, self.dropout)
        mask = self._mask((self.site.linear.input_channels(self.site.layer),), x.device)
        return x * self.site.channels(mask / (1 - self.dropout), x)

    def weight_delta(self, rows: slice) -> Tensor:
        A, B = self.factors()
        if self.site.linear.stack == 1:
            return (self.scale * B[rows]) @ A
        E, R = self.site.linear.stack, B.shape[1]
        per_expert = torch.bmm(B.view(E, -1, R), A.view(E, R, -1))  # (E, O, I)
        return self.scale * per_expert.flatten(0, 1)[rows]

    @property
    def _is_a_product(self) -> bool:
        """True if `weight_delta` is s B A."""
        return self.site.linear.stack == 1 and type(self).weight_delta is LowRankAdapter.weight_delta

    def weight_delta_norm(self) -> float | None:
        if not self._is_a_product:
            return None
        A, B = (factor.detach().cpu().double() for factor in self.factors())
        of_A, of_B = A @ A.T, B.T @ B
        square = float((of_A * of_B).sum())  # |B A|^2 = tr(A A^T B^T B)
        lost_to_rounding = square < 1e-12 * float(of_A.trace() * of_B.trace())
        return None if lost_to_rounding or not math.isfinite(square) else abs(self.scale) * square**0.5

    def add_weight_delta(self, W: Tensor, rows: slice) -> None:
        if not self._is_a_product:
            super().add_weight_delta(W, rows)
            return
        A, B = self.factors()
        W.addmm_(self.scale * B[rows].to(W.dtype), A.to(W.dtype))  # the product stands nowhere by itself

    def _drawn(self, x: Tensor) -> Tensor:
        """What dropout drops of x: a mask, or the places where these are few beside its entries."""
        size = x.numel()
        if self.dropout_on == "features":
            return self._mask(x.shape[-1:], x.device)
        if self.dropout > _FEW or size < 2**16:  # of fewer, a whole number of places would miss the probability
            return self._mask((size // x.shape[-1], x.shape[-1]), x.device)
        # K places, each any of the M: an entry is none of them with probability (1 - 1/M)^K = 1 - dropout
        count = round(-math.log1p(-self.dropout) * size)
        return torch.randint(size, (count,), device=x.device)

    def _mask(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """1 where dropout keeps, 0 where it drops; uint8."""
        # 16 random bits for each: on a CPU bernoulli_ would take as long as the layer itself
        size, kept_of_bits = math.prod(shape), min(round((1 - self.dropout) * 2**16), 2**16 - 1)
        bits = torch.randint(-(2**63), 2**63 - 1, (-(-size // 4),), device=device).view(torch.int16)[:size]
        return (bits < kept_of_bits - 2**15).view(torch.uint8).view(shape)


def is_bare_linear(call: Call) -> bool:
    """True if `call` is the forward of nn.Linear itself, with nothing around it."""
    return getattr(call, "__func__", None) is nn.Linear.forward


def takes_change(site: Site, call: Call, x: Tensor) -> bool:
    """True of a bare frozen convolution whose weights are few beside its input: there one convolution with W + D costs
    less than one with W and others for the change.  W is of 32 bits or more, since D would round away in 16; under
    autocast the sum is rounded, as it is in full fine-tuning.
    """
    return (
        type(site.kind) is ConvKind
        and site.stored.dtype in (torch.float32, torch.float64)
        and site.fan_in * site.fan_out <= x.numel()
        and site.storage.plain
        and getattr(call, "__func__", None) is getattr(type(site.layer), "base_class", type(site.layer)).forward
        and is_frozen(site)
    )


def with_change(site: Site, x: Tensor, D: Tensor) -> Tensor:
    """The output of such a convolution with D (O, I) added to its weight."""
    return cast(ConvKind, site.kind).changed(site.layer, x, D)


def is_frozen(site: Site) -> bool:
    """True if neither the weight nor the bias at the site is trained."""
    b = site.bias
    return not site.stored.requires_grad and (b is None or not b.requires_grad)
