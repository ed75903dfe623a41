"""Fused projections: which output channels of one layer are queries, keys and values.

    side by side      [ q of all heads | k of all groups | v of all groups ]    GPT-2, Phi-3, ModernBERT, MPT
    group by group    [ q ... q | k | v ] for each group                        GPT-NeoX, Bloom, Falcon

A group is the heads that share one k and one v; where every head has its own, there are as many groups as heads.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .errors import TargetError
from .site import Site
from .targets import modules_of

Ranges = tuple[tuple[int, int], ...]  # (start, stop) of output channels, ascending

# model_type of transformers -> the layer's name in its attention module, and whether it goes group by group
_FUSED = {
    "bloom": ("query_key_value", True),
    "falcon": ("query_key_value", True),
    "gpt2": ("c_attn", False),
    "gpt_bigcode": ("c_attn", True),
    "gpt_neox": ("query_key_value", True),
    "modernbert": ("Wqkv", False),
    "mpt": ("Wqkv", False),
    "persimmon": ("query_key_value", True),
    "phi3": ("qkv_proj", False),
}


def channels_of(parts: str, *, heads: int, groups: int, width: int, by_group: bool) -> Ranges:
    """The output channels of some of q, k and v.

    parts: such as "qv".   heads: of queries.   groups: heads of keys and values.   width: of a head, in channels.
    """
    blocks = groups if by_group else 1
    sizes = {"q": heads // blocks, "k": groups // blocks, "v": groups // blocks}
    ranges: list[tuple[int, int]] = []
    stop = 0
    for _ in range(blocks):
        for part, size in sizes.items():
            start, stop = stop, stop + size * width
            if part in parts:
                joins = bool(ranges) and ranges[-1][1] == start
                ranges.append((ranges.pop()[0] if joins else start, stop))
    return tuple(ranges)


def fused_projections(model: nn.Module, parts: str) -> list[tuple[Site, Ranges]]:
    """The fused projections of a model, and the output channels of some of q, k and v in each.

    Raises TargetError if the model has none whose layout is known here.
    """
    found = list(_of_multihead(model, parts)) + list(_of_transformers(model, parts))
    if not found:
        known = ", ".join(["nn.MultiheadAttention", *_FUSED])
        raise TargetError(
            f"{type(model).__name__} has no layer that is known to hold q, k and v in one. Known are those of {known}; "
            'for others say their output channels: rows_pattern={"*.qkv": ((0, 64), (128, 192))}'
        )
    return found


def _of_multihead(model: nn.Module, parts: str) -> Iterator[tuple[Site, Ranges]]:
    for path, module in modules_of(model):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            heads = module.num_heads
            ranges = channels_of(parts, heads=heads, groups=heads, width=module.head_dim, by_group=False)
            yield Site.at(path, module, "in_proj_weight"), ranges


def _of_transformers(model: nn.Module, parts: str) -> Iterator[tuple[Site, Ranges]]:
    modules = dict(modules_of(model))
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = modules[parent_path]
        config = getattr(parent, "config", None) or getattr(model, "config", None)
        fused, by_group = _FUSED.get(getattr(config, "model_type", ""), ("", False))
        if path and name == fused and not getattr(parent, "is_cross_attention", False):  # where it is k and v alone
            site, heads, groups = Site.at(path, module), *_heads(config)
            width = site.fan_out // (heads + 2 * groups)
            yield site, channels_of(parts, heads=heads, groups=groups, width=width, by_group=by_group)


def _heads(config: Any) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = int(config.num_attention_heads)
    if config.model_type == "phi3" or getattr(config, "new_decoder_architecture", False):
        return heads, int(getattr(config, "num_kv_heads", None) or config.num_key_value_heads)
    return heads, 1 if getattr(config, "multi_query", False) else heads
