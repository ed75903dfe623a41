"""Experts: LoRA adapters that live in a model already, for methods that mix them."""

from torch import nn

from .attach import held, is_adapted
from .errors import TargetError, require
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


def expert_at(site: Site, name: str) -> LowRankAdapter | None:
    """The low-rank adapter of this name at this layer, if there is one."""
    found = held(site.layer).get(name) if is_adapted(site.layer) else None
    return found if isinstance(found, LowRankAdapter) else None


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
