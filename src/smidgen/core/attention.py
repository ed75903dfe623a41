"""Attention: put learned keys and values in front of those that an attention module's own call attends to.

    softmax(q [K; k]^T + mask) [V; v]        K: (N, Dk)   V: (N, Dv)

N = positions in front, D = key/value heads x head width.

They come in front after the module has updated its key/value cache, in every call, so they are never in the cache.
How the attention is reached depends on who computes it:

    interface   transformers' modules look up a function by a name in `self.config`; during the call, and only then,
                they see a config that names ours, which calls theirs
    function    modules that call torch's scaled_dot_product_attention or are nn.MultiheadAttention; a TorchFunctionMode

Masks are extended so that every query sees what stands in front.  Where the call is causal without a mask, N queries of
zeros go in front too and their outputs are dropped: the diagonal stays where it was, and so does the fast kernel.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import Call
from .errors import TargetError
from .layers import kind_of

Front = tuple[Tensor, Tensor]  # K and V

_NAME = "smidgen_in_front"  # of our function in transformers' AttentionInterface
_REACHED = ("eager", "sdpa")  # the implementations whose mask we can extend
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
    for names in _PROJECTIONS:
        kinds = [
            (kind_of(child), child) for name in names if isinstance(child := getattr(layer, name, None), nn.Module)
        ]
        if len(kinds) == 2 and all(kind is not None and kind.low_rank for kind, _ in kinds):
            (key, k), (value, v) = kinds
            return key.fans(k)[0], value.fans(v)[0]  # type: ignore[union-attr]
    heads = _number(layer, "num_heads", "n_heads", "n_head", "num_attention_heads", "heads")
    key_width, value_width = _number(layer, "qk_head_dim"), _number(layer, "v_head_dim")
    if heads and key_width and value_width:  # latent attention: keys and values are expanded to all heads
        return heads * key_width, heads * value_width
    heads = _number(layer, "num_key_value_heads", "num_kv_heads", "kv_heads") or heads
    width = _number(layer, "head_dim", "head_size", "attention_head_size")
    if heads and width:
        return heads * width, heads * width
    for child in layer.children():
        kind = kind_of(child)
        if kind is not None and kind.low_rank and kind.fans(child)[0] == 3 * kind.fans(child)[1]:
            return kind.fans(child)[1], kind.fans(child)[1]
    return None


def register() -> None:
    """Enter our function in transformers' table of attention functions; it does nothing until a config names it."""
    from transformers import AttentionInterface  # only asked for modules that came from there

    AttentionInterface.register(_NAME, _attend)


def with_in_front(
    layer: nn.Module, name: str, reach: Reach, front: Front, call: Call, *args: Any, **kwargs: Any
) -> Any:
    """The module's call with K and V in front of its keys and values.

    Raises TargetError if the attention was not reached, or its heads do not fit.
    """
    reached: list[bool] = []  # a list: torch.compile does not follow an attribute of a mode
    if reach.way == "function":
        with _FunctionsInFront(front, reached):
            out = call(*args, **kwargs)
    else:
        before = layer.__dict__["config"]
        layer.__dict__["config"] = _ConfigInFront(before, front, reach.eager, reached)
        try:
            out = call(*args, **kwargs)
        finally:
            layer.__dict__["config"] = before
    if not reached:
        raise TargetError(
            f"{name} ({type(layer).__name__}) ran without calling scaled_dot_product_attention, so nothing was put in "
            "front of its keys. Switch its fused attention on, or leave it out of the targets"
        )
    return out


class _ConfigInFront:
    """A module's config as it is, but naming our attention function; holds what that function needs."""

    _attn_implementation = _NAME

    def __init__(self, config: Any, front: Front, eager: Callable[..., Any] | None, reached: list[bool]) -> None:
        outer = config if isinstance(config, _ConfigInFront) else None  # of a Stack of several
        self.config: Any = outer.config if outer else config
        self.fronts: tuple[Front, ...] = (*outer.fronts, front) if outer else (front,)
        self.marks: tuple[list[bool], ...] = (*outer.marks, reached) if outer else (reached,)
        self.eager = eager

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.   query: (B, H, T, d)   key, value: (B, Hkv, S, d)   out: (B, T, H, d)."""
    config: Any = module.config
    name = config.config._attn_implementation
    if name not in _REACHED:
        raise TargetError(
            f'the model computes attention with "{name}"; keys can be put in front of {" and ".join(_REACHED)} only. '
            'Load it with attn_implementation="sdpa"'
        )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = config.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    for reached in config.marks:
        reached.append(True)
    count = sum(K.shape[0] for K, _ in config.fronts)
    for K, V in config.fronts:
        key, value = _in_front(K, key), _in_front(V, value)
    rows = 0
    if attention_mask is not None:
        attention_mask = _widened(attention_mask, count)
    elif name == "sdpa" and query.shape[2] > 1:  # eager attention without a mask is not causal
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            rows = count
            query = F.pad(query, (0, 0, rows, 0))
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0, rows, 0))
    out, weights = function(module, query, key, value, attention_mask, **kwargs)
    return out[:, rows:] if rows else out, weights


class _FunctionsInFront(TorchFunctionMode):
    """While it lasts, torch's attention functions have K and V in front."""

    def __init__(self, front: Front, reached: list[bool]) -> None:
        super().__init__()
        self.front, self.reached = front, reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.reached.append(True)
            return _scaled_dot_product(self.front, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            self.reached.append(True)
            return _multi_head(self.front, *args, **kwargs)
        return func(*args, **kwargs)


def _scaled_dot_product(
    front: Front,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    K, V = front
    rows = K.shape[0] if is_causal else 0
    out = F.scaled_dot_product_attention(
        F.pad(query, (0, 0, rows, 0)) if rows else query,
        _in_front(K, key),
        _in_front(V, value),
        None if attn_mask is None else _widened(attn_mask, K.shape[0]),
        dropout_p,
        is_causal,
        **kwargs,
    )
    return out[..., rows:, :] if rows else out


def _multi_head(
    front: Front, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **kwargs: Any
) -> Any:
    """F.multi_head_attention_forward, which takes finished keys and values as static_k and static_v (B H, S, d)."""
    K, V = front
    count = K.shape[0]
    W, b = args[0], args[1]  # (3 E, E) and (3 E,), or None where the projections are apart
    _, k_weight, v_weight = W.chunk(3) if W is not None else (None, kwargs["k_proj_weight"], kwargs["v_proj_weight"])
    _, k_bias, v_bias = b.chunk(3) if b is not None else (None, None, None)
    for name, x, weight, bias, learned in (
        ("static_k", key, k_weight, k_bias, K),
        ("static_v", value, v_weight, v_bias, V),
    ):
        held = kwargs.get(name)
        if held is None:
            held = F.linear(x, weight, bias)  # (S, B, E), or (S, E) of a single row
            held = held.reshape(held.shape[0], -1, width // heads).transpose(0, 1)  # (B H, S, d)
        per_head = learned.to(held.dtype).reshape(count, heads, -1).transpose(0, 1)  # (H, N, d)
        kwargs[name] = torch.cat((per_head.repeat(held.shape[0] // heads, 1, 1), held), dim=1)
    for name in ("attn_mask", "key_padding_mask"):  # True or a large negative number hides here; 0 shows
        if kwargs.get(name) is not None:
            kwargs[name] = F.pad(kwargs[name], (count, 0))
    kwargs["is_causal"] = False  # only a hint that the mask is causal, which it was before it was widened
    edge = (0, 0) * (key.ndim - 1) + (count, 0)  # the function counts the keys it is given
    key_room = F.pad(key, edge)
    value_room = key_room if value is key else F.pad(value, edge)
    return F.multi_head_attention_forward(query, key_room, value_room, width, heads, *args, **kwargs)


def _in_front(learned: Tensor, held: Tensor) -> Tensor:
    """learned (N, Hkv d) in front of held (..., H, S, d), in its dtype; a head of ours serves H / Hkv of theirs."""
    *batch, heads, _, width = held.shape
    own_heads, rest = divmod(learned.shape[1], width)
    if not batch or rest or heads % own_heads:
        raise TargetError(
            f"the attention's keys or values are {tuple(held.shape)}; needed is (batch, heads, positions, head width) "
            f"with heads x head width of {learned.shape[1]}, which is what the module seemed to have"
        )
    rows = learned.to(held.dtype).view(-1, own_heads, width).transpose(0, 1)  # (Hkv, N, d)
    if own_heads != heads:
        rows = rows.repeat_interleave(heads // own_heads, dim=0)
    return torch.cat((rows.expand(*batch, -1, -1, -1), held), dim=-2)


def _widened(mask: Tensor, count: int) -> Tensor:
    """A mask (..., S), True or 0 where a key is seen, with `count` keys in front that all queries see."""
    return F.pad(mask, (count, 0), value=mask.dtype == torch.bool)


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
