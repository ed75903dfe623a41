"""Attention: where a module computes it, how that is reached from outside, and how wide its keys and values are.

    interface   transformers' modules look up a function by a name in `self.config`
    function    modules that call torch's scaled_dot_product_attention, or are nn.MultiheadAttention

What is done there: attention_calls.py.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

from torch import Tensor, nn

from .layers import kind_of

Front = tuple[Tensor, Tensor]  # K and V

_PROJECTIONS = (
    ("k_proj", "v_proj"),
    ("key", "value"),
    ("k", "v"),
    ("k_lin", "v_lin"),
    ("linear_k", "linear_v"),
    ("to_k", "to_v"),
    ("Wk", "Wv"),
    ("wk", "wv"),
)


@dataclass(frozen=True)
class Reach:
    """How a module's attention is reached.   eager: the module's own plain attention, where its family has one."""

    way: Literal["interface", "function"]
    eager: Callable[..., Any] | None = None


def reach_of(layer: nn.Module) -> Reach | None:
    """How the attention that this module's own forward computes is reached; None if that cannot be, or it has none."""
    if isinstance(layer, nn.MultiheadAttention):
        return None if layer.bias_k is not None else Reach("function")
    forward = inspect.unwrap(type(layer).forward)
    codes = list(_codes(type(layer), forward))
    names = {name for code in codes for name in code.co_names}
    if "ALL_ATTENTION_FUNCTIONS" in names and hasattr(getattr(layer, "config", None), "_attn_implementation"):
        if any(
            "sdpa" in constant for code in codes for constant in code.co_consts if isinstance(constant, str | tuple)
        ):
            return None  # it makes another mask by the name of the implementation: sparse attention
        eager = next((name for name in sorted(names) if name.endswith("eager_attention_forward")), "")
        return Reach("interface", forward.__globals__.get(eager))
    return Reach("function") if "scaled_dot_product_attention" in names else None


def widths_of(layer: nn.Module) -> tuple[int, int] | None:
    """(Dk, Dv) of an attention module: all key/value heads together; None if the module does not tell."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    if (found := _key_and_value(layer)) is not None:
        k, v = found
        return _fans(k)[0], _fans(v)[0]
    heads = _number(layer, "num_heads", "n_heads", "n_head", "num_attention_heads", "heads")
    key_width, value_width = _number(layer, "qk_head_dim"), _number(layer, "v_head_dim")
    if heads and key_width and value_width:  # latent attention: keys and values are expanded to all heads
        return heads * key_width, heads * value_width
    heads = _number(layer, "num_key_value_heads", "num_kv_heads", "kv_heads") or heads
    width = _number(layer, "head_dim", "head_size", "attention_head_size")
    if heads and width:
        return heads * width, heads * width
    width = next((_fans(child)[1] for child in layer.children() if _is_fused(child)), 0)
    return (width, width) if width else None


def reads_of(layer: nn.Module) -> int | None:
    """How many features the keys and values of `keys_and_values` are made from; None if it cannot make them."""
    if isinstance(layer, nn.MultiheadAttention):
        return None
    if (found := _key_and_value(layer)) is not None:
        return _fans(found[0])[1] if _fans(found[0])[1] == _fans(found[1])[1] else None
    fused = getattr(layer, "c_attn", None)
    return _fans(fused)[1] if _is_fused(fused) else None


def keys_and_values(layer: nn.Module, x: Tensor) -> Front:
    """The module's own projections of x (B, N, I): keys (B, N, Dk) and values (B, N, Dv), without positions."""
    if (found := _key_and_value(layer)) is not None:
        return found[0](x), found[1](x)
    _, key, value = layer.c_attn(x).chunk(3, dim=-1)  # type: ignore[operator]
    return key, value


def _key_and_value(layer: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The layers that make keys and values, where these are two."""
    for names in _PROJECTIONS:
        k, v = (getattr(layer, name, None) for name in names)
        if isinstance(k, nn.Module) and isinstance(v, nn.Module) and _fans(k)[0] and _fans(v)[0]:
            return k, v
    return None


def _is_fused(layer: nn.Module | None) -> bool:
    """True if a layer may make queries, keys and values of one width at once."""
    fan_out, fan_in = _fans(layer)
    return fan_in > 0 and fan_out == 3 * fan_in


def _fans(layer: nn.Module | None) -> tuple[int, int]:
    kind = None if layer is None else kind_of(layer)
    return kind.fans(layer) if layer is not None and kind is not None and kind.low_rank else (0, 0)


def _codes(cls: type, forward: FunctionType) -> Iterator[CodeType]:
    """The code of forward, and of the class's own methods that it calls."""
    yield forward.__code__
    for name in forward.__code__.co_names:
        method = inspect.unwrap(found) if callable(found := inspect.getattr_static(cls, name, None)) else None
        if isinstance(method, FunctionType) and method is not forward:
            yield method.__code__


def _number(layer: nn.Module, *names: str) -> int:
    """The first of these whole numbers that the module, or else its config, has; 0 if none."""
    config = getattr(layer, "config", None)
    found = (getattr(owner, name, None) for owner in (layer, config) for name in names)
    return next((number for number in found if isinstance(number, int)), 0)
