"""A small model of the same kind as a transformers decoder, to run beside it: fewer layers, maybe narrower."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import AttachError, require
from .site import Site

# what other architectures call a field of their config
_ALSO = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("ffn_dim", "n_inner"),
    "num_attention_heads": ("n_head", "num_heads"),
}


def mirror_of(body: nn.Module, sizes: Mapping[str, int | None], device: torch.device) -> nn.Module:
    """A model of the body's class with these fields of its config changed, fp32, its start random.

    Draws no random number that anybody else would get.  Raises ConfigError.
    """
    config = deepcopy(cast(Any, body).config)
    for field, value in sizes.items():
        if value is not None:
            name = next((name for name in (field, *_ALSO[field]) if hasattr(config, name)), None)
            require(name is not None, f"the config of {type(body).__name__} has no {field} to change")
            setattr(config, cast(str, name), value)
    layers = int(config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        kinds = list(config.layer_types)
        config.layer_types = (kinds + kinds[-1:] * layers)[:layers]
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, layers)
    make = getattr(type(body), "base_class", type(body))
    without_memory = device.type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if without_memory else "cpu"):
        mirror = cast(nn.Module, make(config))
    return mirror if without_memory else mirror.to(device)


def fill_afresh_(mirror: nn.Module, generator: torch.Generator | None) -> None:
    """Give a mirror a new random start, as its own class does it, with random numbers from `generator` alone."""
    device = torch.device("cpu") if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            fresh = type(mirror)(cast(Any, mirror).config)
    values = fresh.state_dict()
    with torch.no_grad():
        for name, own in mirror.state_dict(keep_vars=True).items():
            own.copy_(values[name])


def run_mirror(mirror: nn.Module, embedded: Tensor, **kwargs: Any) -> Tensor:
    """Its last hidden states (B, T, D) for embedded tokens, computed in their dtype."""
    own = {name: p.to(embedded.dtype) for name, p in mirror.named_parameters()}
    return cast(Tensor, torch.func.functional_call(mirror, own, (), {"inputs_embeds": embedded, **kwargs})[0])


def room_in_cache(cache: Any, base_layers: int, more: int) -> None:
    """Give a transformers cache the layers of a mirror behind those of the base, so that both grow and move together.

    Raises AttachError if it has begun without them, or is of a kind that cannot grow.
    """
    if len(cache.layers) >= base_layers + more:
        return
    kinds = {type(layer).__name__ for layer in cache.layers}
    if cache.get_seq_length() or kinds - {"DynamicLayer"}:
        raise AttachError(
            "the shadow network needs room in the cache: an empty DynamicCache as past_key_values, which generate() "
            "makes by itself, or use_cache=False"
        )
    while len(cache.layers) < base_layers + more:
        cache.layers.append(type(cache.layers[0])())


class GatedUpdate(nn.Module):
    """T and G after one block, each of two layers, u inside: what becomes of a shadow's state."""

    def __init__(self, site: Site, W: int, u: int) -> None:
        super().__init__()
        for name in "TG":
            self.register_parameter(f"{name}_in", site.empty(u, W))
            self.register_parameter(f"{name}_in_bias", site.empty(u))
            self.register_parameter(f"{name}_out", site.empty(W, u))
            self.register_parameter(f"{name}_out_bias", site.empty(W))

    def reset(self, generator: torch.Generator | None) -> None:
        """As torch starts nn.Linear."""
        for name, parameter in self.named_parameters():
            fan_in = self.get_parameter(name.removesuffix("_bias")).shape[1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """The next state, of the block's output h (B, T, W) and the state s before it."""
        g = self._layers("G", h).sigmoid()
        return torch.lerp(s, self._layers("T", h), g)

    def _layers(self, name: str, h: Tensor) -> Tensor:
        own = [self.get_parameter(f"{name}_{part}").to(h.dtype) for part in ("in", "in_bias", "out", "out_bias")]
        return F.linear(F.gelu(F.linear(h, own[0], own[1])), own[2], own[3])
