"""Side places: how a small network runs at one place of a transformer.   Which places there are: side_network.py."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter, AdditiveAdapter, Call
from .errors import require
from .method import Shared
from .site import Site


class Network(nn.Module):
    """a, in two halves; where one lives elsewhere, its width is 0."""

    def reset(self, generator: torch.Generator | None) -> None:
        """Initialise all parameters, with random numbers from `generator` alone, so that a gives 0."""
        raise NotImplementedError

    def connect(self, shared: Shared) -> None:
        """Take what all networks of the method use together."""

    def hidden(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., W)."""
        raise NotImplementedError

    def expanded(self, h: Tensor) -> Tensor:
        """(..., W) -> (..., O)."""
        raise NotImplementedError


def leave_out(parts: Mapping[str, Adapter], first: int) -> None:
    """From now on, outside of training, leave out the adapters of the first blocks.   parts: `AdapterSet.parts`."""
    for part in parts.values():
        require(hasattr(part, "shared") and isinstance(part.shared, Together), "it was made with drop_first=0")
        cast(Together, part.shared).left_out = first


class Together(Shared):
    """What the networks of one model pass to each other.

    hidden: what the first layer of each feed-forward has for the last, by the path of the feed-forward; filled and
        emptied within one call of the block.  A call that fails between the two is overwritten by the next.
    left_out: how many blocks are left out outside of training.   drawn: in this step of training.
    """

    def __init__(self, sites: tuple[Site, ...], drop_first: int) -> None:
        super().__init__()
        self.hidden: dict[str, Tensor] = {}
        self.most = self.left_out = drop_first
        self.draws, self.drawn = sites[0].name, -1  # the site that is called first draws for all

    def leaves_out(self, part: "SideAdapter") -> bool:
        """True if this part has nothing to do in this call."""
        if not self.most and not self.left_out:
            return False
        if part.training and part.site.name == self.draws:
            self.drawn = 0 if self.drawn < 0 else int(torch.randint(self.most + 1, ()))
        return part.block < (self.drawn if part.training else self.left_out)


class SideAdapter(Adapter):
    """A network, or half of one, at one place."""

    mergeable = False

    def __init__(self, site: Site, net: Network) -> None:
        super().__init__(site)
        self.net = net
        self.block = block_of(site)
        self.together: Together | None = None

    def prepare(self) -> None:
        if hasattr(self, "shared"):
            self.__dict__["together"] = self.shared  # not a second place in the tree of modules
            self.net.connect(cast(Shared, self.shared))

    def reset(self, generator: torch.Generator | None) -> None:
        self.net.reset(generator)

    @property
    def idle(self) -> bool:
        """True if it is left out of this call."""
        return self.together is not None and self.together.leaves_out(self)


class After(SideAdapter):
    """After a layer."""

    def __init__(self, site: Site, net: Network) -> None:
        super().__init__(site, net)
        self.axis = -1  # of the channels: not the last in a convolution
        if site.kind is not None:
            one = torch.ones(site.fan_out)
            self.axis = -site.channels(one, one).ndim

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        if self.idle:
            return out
        y = out[0] if isinstance(out, tuple) else out  # an attention's first output is the hidden state
        change = self.net.expanded(self.net.hidden(y.movedim(self.axis, -1) if self.axis != -1 else y))
        y = torch.add(y, (change.movedim(-1, self.axis) if self.axis != -1 else change).to(y.dtype))
        return (y, *out[1:]) if isinstance(out, tuple) else y


class AfterModule(After):
    """After a block or an attention, which is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


class AtNorm(SideAdapter):
    """At a norm: it reads what the norm gives, and adds to what the norm is given."""

    def forward(self, call: Call, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = call(z, *args, **kwargs)
        if self.idle:
            return normed
        return call(torch.add(z, self.net.expanded(self.net.hidden(normed)).to(z.dtype)), *args, **kwargs)


class Beside(SideAdapter, AdditiveAdapter):
    """Beside a linear layer or a whole feed-forward."""

    def delta(self, x: Tensor) -> Tensor:
        return x.new_zeros(()) if self.idle else self.net.expanded(self.net.hidden(x))


class BesideModule(Beside):
    """Beside a feed-forward that is called with more than one tensor: a batch of mixed rows runs apart."""

    by_row = False


class FirstLayer(SideAdapter, AdditiveAdapter):
    """The first half, at the first layer of a feed-forward that is no module of its own; its output stays as it is."""

    by_row = False  # one slot, so one group of rows at a time

    def __init__(self, site: Site, net: Network, owner: str) -> None:
        super().__init__(site, net)
        self.owner = owner

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.delta(x)
        return call(x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self.idle:
            cast(Together, self.together).hidden[self.owner] = self.net.hidden(x)
        return x.new_zeros(())


class LastLayer(SideAdapter, AdditiveAdapter):
    """The other half, at the last layer of that feed-forward."""

    by_row = False

    def __init__(self, site: Site, net: Network, owner: str) -> None:
        super().__init__(site, net)
        self.owner = owner

    def delta(self, x: Tensor) -> Tensor:
        if self.idle:
            return x.new_zeros(())
        return self.net.expanded(cast(Together, self.together).hidden.pop(self.owner))


def block_of(site: Site) -> int:
    """Which block of its stack a site is in, from 0."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site.path)
    return int(number[1]) if number else 0
