"""Experts: LoRA adapters that live in a model already, for methods that mix them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .attach import held, is_adapted
from .errors import ConfigError, TargetError, require
from .layers import EmbeddingKind, LinearKind
from .low_rank import LowRankAdapter
from .site import Site
from .targets import modules_of


def sites_of(model: nn.Module, experts: tuple[str, ...]) -> list[Site]:
    """Where adapters of these names live, in the model's order.  Raises ConfigError if one is no LoRA of layers."""
    found, wrong = [], []
    for path, layer in modules_of(model):
        held_here = held(layer)._modules if is_adapted(layer) else {}
        here = {key: part for key, part in held_here.items() if key.partition("@")[0] in experts}
        if not here:
            continue
        site = Site.at(path, layer)
        found.append(site)
        if not isinstance(site.kind, LinearKind | EmbeddingKind):
            wrong += [f"{key} at {site.name}" for key in here]
        else:
            wrong += [f"{k} at {site.name}" for k, part in here.items() if "@" in k or not _is_low_rank(part)]
    require(not wrong, f"only low-rank adapters of linear layers and embeddings mix, not {', '.join(wrong[:5])}")
    return found


def live_in(model: nn.Module, experts: Sequence[str], mixture: str, *, or_fresh: bool) -> bool:
    """True if adapters of all these names live in the model; False if none does and they may be fresh.

    Raises ConfigError otherwise.   mixture: the class of the method that asks.
    """
    missing = [name for name in experts if not sites_of(model, (name,))]
    if not missing or (or_fresh and len(missing) == len(experts)):
        return not missing
    raise ConfigError(
        f"no adapter of the model is called {', '.join(missing)}. {mixture} mixes adapters that live in it: "
        f'load(model, "out/math", "math"), then {mixture}(experts=("math", ...)). Fresh ones: train_experts=True'
    )


def expert_at(site: Site, name: str) -> LowRankAdapter | None:
    """The low-rank adapter of this name at this layer, if there is one."""
    found = held(site.layer).get(name) if is_adapted(site.layer) else None
    return found if isinstance(found, LowRankAdapter) else None


class ExpertsAdapter(Adapter):
    """The experts of one layer: A (K R, I), B (O, K R), parameters where they are trained, else buffers.

    Those that live in the model are copied from there; where none does they start afresh.
    """

    starts_as_base = mergeable = False
    A: Tensor
    B: Tensor

    def __init__(self, site: Site, experts: tuple[str, ...], rank: int, *, trained: bool) -> None:
        super().__init__(site)
        self.experts, self.rank, self.is_taken = experts, rank, False
        wide = len(experts) * rank
        for name, value in (("A", site.empty(wide, site.fan_in)), ("B", site.empty(site.fan_out, wide))):
            if trained:
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value.detach())

    @torch.no_grad()
    def prepare(self) -> None:
        self.is_taken = any(expert_at(self.site, name) is not None for name in self.experts)
        for number, name in enumerate(self.experts if self.is_taken else ()):
            own, (A, B, scale) = slice(number * self.rank, (number + 1) * self.rank), self.expert(name)
            self.A[own], self.B[:, own] = A, scale * B

    def expert(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A (R, I) and B (O, R) of an expert, filled up with zeros, and its scale; zeros where it has no part."""
        expert = expert_at(self.site, name)
        A, B = self.A.new_zeros(self.rank, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], self.rank)
        found = expert.factors() if expert else (A[:0], B[:, :0])
        rank = len(found[0])
        if rank <= self.rank:  # else it is another one of that name, and the file has ours
            A[:rank], B[:, :rank] = found
        return A, B, expert.scale if expert else 1.0

    def reset(self, generator: torch.Generator | None) -> None:
        if not self.is_taken:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.B)


def body_of(model: nn.Module) -> Site:
    """A transformers model without its head, whose output is the last hidden states.  Raises TargetError."""
    body, config = getattr(model, "base_model", None), getattr(model, "config", None)
    require(
        isinstance(body, nn.Module)
        and hasattr(config, "hidden_size")
        and not getattr(config, "is_encoder_decoder", False),
        f"{type(model).__name__} has no hidden states to read: name a transformers model of one encoder or decoder",
        TargetError,
    )
    return next(Site(path, module) for path, module in modules_of(model) if module is body)


def _is_low_rank(part: nn.Module | None) -> bool:
    return isinstance(part, LowRankAdapter) and part.additive
