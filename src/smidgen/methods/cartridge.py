"""Cartridge: a key/value cache of a long text, made short and trained.  Eyuboglu et al. 2025, arXiv:2506.06266, section
3.

    softmax(q [K0; K; k]^T / sqrt(d)) [V0; V; v]        K0, V0: (F, D)   K, V: (N - F, D)

N = length, F = frozen, D = key/value heads x head width.   All start from the cache that the base model has of the
first N tokens of a text, or at random; the first F, which the other tokens use as a sink of attention, stay.   Real
tokens stand at positions N, N + 1, ..., as behind that text.   Trainable parameters: 2 (N - F) D per attention.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attach import PLAN, VALUES, is_adapted, set_plans
from ..core.attention import Front
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.method import Shared, method
from ..core.prefixes import PositionsAdapter, PrefixAdapter, PrefixMethod
from ..core.site import Site
from ..core.targets import Resolution, modules_of


@method("cartridge")
@dataclass(frozen=True, kw_only=True)
class Cartridge(PrefixMethod):
    """A trained cache in front of every attention of a decoder; it stands for a text that need not be read again.

    length: N.   frozen: F.
    init_ids: token ids of the text, at least N.  Without them the start is random, which the paper finds much worse.
    """

    length: int = 128
    frozen: int = 1
    init_ids: tuple[int, ...] = ()

    shift_positions = True
    summary = "softmax(q [K; k]^T) [V; v], K and V from a text's cache"
    paper = "Eyuboglu et al. 2025, arXiv:2506.06266"
    disk = DiskNames("CARTRIDGE", fields={"length": "num_virtual_tokens", "frozen": "num_frozen_tokens"})

    def check(self) -> None:
        object.__setattr__(self, "init_ids", tuple(self.init_ids))
        require_whole(self, "length")
        require_whole(self, "frozen", least=0)
        require(self.frozen < self.length, f"frozen is {self.frozen}; it must be below the length, {self.length}")
        enough = not self.init_ids or len(self.init_ids) >= self.length
        require(enough, f"init_ids are {len(self.init_ids)} tokens; a cartridge of length {self.length} needs as many")

    def resolve(self, model: nn.Module) -> Resolution:
        if self.init_ids and "use_cache" not in inspect.signature(model.forward).parameters:
            raise TargetError(f"{type(model).__name__} has no key/value cache to start from: leave init_ids out")
        return super().resolve(model)

    def build(self, site: Site) -> Adapter:
        return PrefillAdapter(self, site) if site.path else PositionsAdapter(self.length, site)

    def shared(self, sites: tuple[Site, ...]) -> "Prefill | None":
        return Prefill(self, sites) if self.init_ids else None


class PrefillAdapter(PrefixAdapter):
    """K and V of one attention, and those before them that stay."""

    shared: "Prefill"
    K: nn.Parameter
    V: nn.Parameter
    fixed_K: Tensor
    fixed_V: Tensor

    def __init__(self, method: Cartridge, site: Site) -> None:
        super().__init__(site)
        self.length, self.frozen, self.from_text = method.length, method.frozen, bool(method.init_ids)
        for name, width in zip("KV", self.widths, strict=True):
            setattr(self, name, site.empty(method.length - method.frozen, width))
            self.register_buffer(f"fixed_{name}", site.empty(method.frozen, width).detach())

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        for number, name in enumerate("KV"):
            fixed, learned = getattr(self, f"fixed_{name}"), getattr(self, name)
            if self.from_text:
                start = self.shared.of(self.site)[number]
                fixed.copy_(start[: self.frozen])
                learned.copy_(start[self.frozen : self.length])
            else:
                nn.init.normal_(fixed, generator=generator)
                nn.init.normal_(learned, generator=generator)

    def front(self) -> Front:
        return torch.cat((self.fixed_K, self.K)), torch.cat((self.fixed_V, self.V))


class Prefill(Shared):
    """The base model's cache of the text; it is read once and not kept."""

    def __init__(self, method: Cartridge, sites: tuple[Site, ...]) -> None:
        super().__init__()
        *attentions, whole = sites
        self.ids, self.model = method.init_ids, [whole.layer]  # in a list: the model is no part of this
        self.paths = [site.path for site in attentions]
        self.caches: list[Front] = []

    def of(self, site: Site) -> Front:
        """K and V (T, D) of the whole text at one attention.  The last one asked for empties what is held."""
        if not self.caches:
            self.caches = _caches(self.model[0], self.ids)
            if len(self.caches) != len(self.paths):
                raise TargetError(
                    f"{len(self.caches)} layers of {type(self.model[0]).__name__} have a cache, {len(self.paths)} "
                    "attentions get a cartridge: leave init_ids or targets out"
                )
        found = self.caches[self.paths.index(site.path)]
        if site.path == self.paths[-1]:
            self.caches = []
        return found


@torch.no_grad()
def _caches(model: nn.Module, ids: tuple[int, ...]) -> list[Front]:
    """K and V (T, D) that the model without adapters caches of these tokens, layer by layer."""
    adapted = [module for _, module in modules_of(model) if is_adapted(module)]
    plans = [(module, module.__dict__[PLAN], module.__dict__[VALUES]) for module in adapted]
    was_training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        for module in adapted:
            set_plans(module, None, {})
        model.eval()
        cache = model(torch.tensor([ids], device=device), use_cache=True).past_key_values
    finally:
        for module, plan, values in plans:
            set_plans(module, plan, values)
        for module in was_training:
            module.training = True
    return [(_flat(layer.keys), _flat(layer.values)) for layer in cache.layers]


def _flat(held: Tensor) -> Tensor:
    return held[0].transpose(0, 1).flatten(1)  # (1, H, T, d) -> (T, H d)
