"""Change what an attention module's own call computes, between its projections.

    in front    softmax(q [K; k]^T + mask) [V; v]           K: (N, Dk)   V: (N, Dv)
    beside      softmax(q k^T + mask) v + f(q, scale)       f: from the queries, which the scores scale by `scale`

N = positions in front, D = key/value heads x head width.

Keys and values come in front after the module has updated its key/value cache, in every call, so they are never in the
cache.  How the attention is reached depends on who computes it:

    interface   during the call, and only then, the module sees a config that names our function, which calls its own
    function    a TorchFunctionMode

Masks are extended so that every query sees what stands in front.  Where the call is causal without a mask, N queries of
zeros go in front too and their outputs are dropped: the diagonal stays where it was, and so does the fast kernel.
Where that kernel would skip little for being causal, a mask costs less.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapter import Call
from .attention import Front, Reach
from .errors import TargetError

Beside = Callable[[Tensor, float], Tensor]  # queries (B, H, T, d), scale of the scores -> what to add, (B, H, T, d)

_NAME = "smidgen_changed"  # of our function in transformers' AttentionInterface
_REACHED = ("eager", "sdpa")  # the implementations whose mask we can extend
_BLOCK = 512  # keys that the processor's causal kernel goes through at once, seen or not


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
    return _changed(layer, name, reach, (front,), (), call, *args, **kwargs)


def with_beside(
    layer: nn.Module, name: str, reach: Reach, beside: Beside, call: Call, *args: Any, **kwargs: Any
) -> Any:
    """The module's call with something added to what the values come to, before the module's output layer.

    Not in nn.MultiheadAttention.   Raises TargetError if the attention was not reached.
    """
    return _changed(layer, name, reach, (), (beside,), call, *args, **kwargs)


def per_head(rows: Tensor, heads: int, width: int) -> Tensor | None:
    """rows (N, Hkv d) as (heads, N, d), each of their heads for heads / Hkv of these; None if they do not divide."""
    own_heads, rest = divmod(rows.shape[1], width)
    if rest or not own_heads or heads % own_heads:
        return None
    apart = rows.view(-1, own_heads, width).transpose(0, 1)  # (Hkv, N, d)
    return apart if own_heads == heads else apart.repeat_interleave(heads // own_heads, dim=0)


def _changed(
    layer: nn.Module,
    name: str,
    reach: Reach,
    fronts: tuple[Front, ...],
    besides: tuple[Beside, ...],
    call: Call,
    *args: Any,
    **kwargs: Any,
) -> Any:
    reached: list[bool] = []  # a list: torch.compile does not follow an attribute of a mode
    if reach.way == "function":
        with _ChangedFunctions(fronts, besides, reached):
            out = call(*args, **kwargs)
    else:
        before = layer.__dict__["config"]
        layer.__dict__["config"] = _ChangedConfig(before, fronts, besides, reach.eager, reached)
        try:
            out = call(*args, **kwargs)
        finally:
            layer.__dict__["config"] = before
    if not reached:
        raise TargetError(
            f"{name} ({type(layer).__name__}) ran without calling scaled_dot_product_attention, so the adapter did "
            "nothing. Switch its fused attention on, or leave it out of the targets"
        )
    return out


class _ChangedConfig:
    """A module's config as it is, but naming our attention function; holds what that function needs."""

    _attn_implementation = _NAME

    def __init__(
        self,
        config: Any,
        fronts: tuple[Front, ...],
        besides: tuple[Beside, ...],
        eager: Callable[..., Any] | None,
        reached: list[bool],
    ) -> None:
        outer = config if isinstance(config, _ChangedConfig) else None  # of a Stack of several
        self.config: Any = outer.config if outer else config
        self.fronts: tuple[Front, ...] = (*outer.fronts, *fronts) if outer else fronts
        self.besides: tuple[Beside, ...] = (*outer.besides, *besides) if outer else besides
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
    rows, bare_query = 0, query
    if not count:
        pass
    elif attention_mask is not None:
        attention_mask = _widened(attention_mask, count)
    elif name == "sdpa" and query.shape[2] > 1:  # eager attention without a mask is not causal
        causal = kwargs.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:
            seen = key.shape[-2] - count
            if _is_better_masked(query, seen, count):
                attention_mask, kwargs["is_causal"] = _causal_mask(query.shape[-2], seen, count, query.dtype), False
            else:
                rows = count
                query = F.pad(query, (0, 0, rows, 0))
    if count and kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0, rows, 0))
    out, weights = function(module, query, key, value, attention_mask, **kwargs)
    out = out[:, rows:] if rows else out
    scale = kwargs.get("scaling")
    for beside in config.besides:
        out = out + beside(bare_query, bare_query.shape[-1] ** -0.5 if scale is None else scale).transpose(1, 2)
    return out, weights


class _ChangedFunctions(TorchFunctionMode):
    """While it lasts, torch's attention functions have K and V in front, or something beside."""

    def __init__(self, fronts: tuple[Front, ...], besides: tuple[Beside, ...], reached: list[bool]) -> None:
        super().__init__()
        self.fronts, self.besides, self.reached = fronts, besides, reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.reached.append(True)
            if self.fronts:
                return _scaled_dot_product(self.fronts[0], *args, **kwargs)
            query, scale = kwargs["query"] if "query" in kwargs else args[0], kwargs.get("scale")
            change = self.besides[0](query, query.shape[-1] ** -0.5 if scale is None else scale)
            return func(*args, **kwargs) + change
        if func is F.multi_head_attention_forward and self.fronts:
            self.reached.append(True)
            return _multi_head(self.fronts[0], *args, **kwargs)
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
    attn_mask = None if attn_mask is None else _widened(attn_mask, K.shape[0])
    if is_causal and attn_mask is None and _is_better_masked(query, key.shape[-2], len(K)):
        attn_mask, is_causal = _causal_mask(query.shape[-2], key.shape[-2], len(K), query.dtype), False
    rows = K.shape[0] if is_causal else 0
    out = F.scaled_dot_product_attention(
        F.pad(query, (0, 0, rows, 0)) if rows else query,
        _in_front(K, key),
        _in_front(V, value),
        attn_mask,
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
        rows = learned.to(held.dtype).reshape(count, heads, -1).transpose(0, 1)  # (H, N, d)
        kwargs[name] = torch.cat((rows.repeat(held.shape[0] // heads, 1, 1), held), dim=1)
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
    rows = per_head(learned.to(held.dtype), heads, width)
    if not batch or rows is None:
        raise TargetError(
            f"the attention's keys or values are {tuple(held.shape)}; needed is (batch, heads, positions, head width) "
            f"with heads x head width of {learned.shape[1]}, which is what the module seemed to have"
        )
    return torch.cat((rows.expand(*batch, -1, -1, -1), held), dim=-2)


def _widened(mask: Tensor, count: int) -> Tensor:
    """A mask (..., S), True or 0 where a key is seen, with `count` keys in front that all queries see."""
    return F.pad(mask, (count, 0), value=mask.dtype == torch.bool)


def _is_better_masked(query: Tensor, keys: int, count: int) -> bool:
    """True where queries (..., T, d) take less time with a mask over `keys` + `count` keys than with rows of zeros."""
    if query.device.type != "cpu" or type(query) is not Tensor or torch.compiler.is_compiling():
        return False  # a compiled shape may stand for any other
    return keys + count <= _BLOCK or count >= query.shape[-2]


@functools.lru_cache(maxsize=1)  # the same for every layer
def _causal_mask(T: int, keys: int, count: int, dtype: torch.dtype) -> Tensor:
    """(T, count + keys): 0 where a query sees a key, the `count` in front and those up to its own; else -inf."""
    with torch.inference_mode(False):
        return torch.full((T, count + keys), -torch.inf, dtype=dtype).triu_(count + 1)
