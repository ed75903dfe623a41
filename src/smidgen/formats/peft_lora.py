"""LoRA in Hugging Face PEFT's folder.

    layer                       ours                        theirs
    Linear, Conv1D of GPT-2     A (R, I)       B (O, R)     lora_A.weight (R, I)             lora_B.weight (O, R)
    Conv, not grouped           A (R, C k)     B (O, R)     lora_A.weight (R, C, *k)         lora_B.weight (O, R, *1)
    Embedding                   A (R, I)       B (O, R)     lora_embedding_A (R, I)          lora_embedding_B (O, R)
    parameter (O, I)            A (R, I)       B (O, R)     lora_A.weight (R, I)             lora_B.weight (O, R)
    experts (E, O, I)           A (E R, I)     B (E O, R)   lora_A.weight (E R, I)           lora_B.weight (O, R E)
      ... held as (E, in, out)  A (E R, out)   B (E in, R)  lora_A.weight (E R, in)          lora_B.weight (out, R E)

A parameter's key does not name it: HF PEFT nests one wrapper per parameter of a module in the order in which the module
registered them, the first one innermost, and every level adds ".base_layer".  Of nn.MultiheadAttention it always adapts
in_proj_weight under the module's key and out_proj under ".base_layer.out_proj", and adds the change of out_proj twice
(0.21.2): so what it trained is read with alpha doubled there, and written only where it is.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ..core.layers import ConvKind, EmbeddingKind, LinearKind
from ..core.method import Method
from ..core.site import Site
from ..methods.lora import SUBTRACTED, LoRA
from .layout import PREFIX, Modules, Stored, Tensors, clean
from .lora_starts import OF_BASE, is_known, refuse_start, with_start
from .translation import (
    Found,
    PeftTranslation,
    Shapes,
    by_site,
    exact_names,
    first_match,
    number,
    pattern_of,
    refuse_unknown,
    target_modules,
    transposed,
)

SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
USED = frozenset({"r", "lora_alpha", "lora_bias", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"})


class LoRATranslation(PeftTranslation):
    """LoRA on every kind of layer that HF PEFT has it for."""

    def obstacle(self, modules: Modules, method: Method, sites: Sequence[Site]) -> str | None:
        method = cast(LoRA, method)
        for site in sites:
            if reason := _obstacle_at(site, method):
                return f"{site.name or 'the model'}: {reason}"
        for site in sites:
            if _in_attention(site):
                pair = [s for s in sites if s.path == site.path]
                if len(pair) != 2 or len({(method.rank_at(s), _their_alpha(method, s)) for s in pair}) > 1:
                    return f"{site.path}: HF PEFT adapts in_proj_weight and out_proj together, and out_proj twice"
        return None

    def fields(self, modules: Modules, method: Method, sites: Sequence[Site]) -> dict[str, Any]:
        method = cast(LoRA, method)
        parameters = [site for site in sites if site.parameter and not _in_attention(site)]
        called = sorted({clean(site.path) for site in sites if not site.parameter or _in_attention(site)})
        times = 2 if method.start in SUBTRACTED else 1  # A0 and B0 stand beside A and B; s stays what it is
        by = math.sqrt(times) if method.rank_stabilised else times
        ranks = {_name(site): times * method.rank_at(site) for site in sites}
        alphas = {_name(site): _number(by * _their_alpha(method, site)) for site in sites}
        return {
            "r": times * method.rank,
            "lora_alpha": _number(by * method.alpha),
            "lora_bias": method.bias_on_B,
            "lora_dropout": method.dropout,
            "use_rslora": method.rank_stabilised,
            "rank_pattern": _their_pattern(ranks, times * method.rank),
            "alpha_pattern": _their_pattern(alphas, _number(by * method.alpha)),
            "target_modules": target_modules(modules, called) if called else [],
            "target_parameters": sorted(clean(site.name) for site in parameters) or None,
            "fan_in_fan_out": transposed(sites),
        }

    def stored_peft(self, method: Method, sites: Sequence[Site], tensors: Tensors) -> list[Stored]:
        method, nested = cast(LoRA, method), _depths(sites)
        found = []
        for site in sites:
            entries = _stored_at(site, nested.get(site.name, 0))
            found += with_start(entries, method, site) if method.start in SUBTRACTED else entries
            if method.bias_on_B:
                found.append(Stored(f"{PREFIX}{clean(site.path)}.lora_B.bias", ((site.name, "bias"),)))
        return found

    def find(self, modules: Modules, config: Mapping[str, Any], shapes: Shapes) -> Found:
        start = config.get("init_lora_weights", True)
        refuse_unknown(config, USED | ({"init_lora_weights"} if is_known(start) else set()))
        sites: dict[str, Site] = {}
        for key in shapes:
            suffix = next((end for end in SUFFIXES if key.endswith(end)), None)
            site = _site(modules, key.removeprefix(PREFIX).removesuffix(suffix), config) if suffix else None
            if site is not None:  # else the tensor is reported as one that the model has no place for
                sites.setdefault(site.name, site)
        ranks = pattern_of(config, "rank_pattern", whole=True)
        alphas = pattern_of(config, "alpha_pattern")
        rank, alpha = number(config, "r", whole=True), float(number(config, "lora_alpha"))
        found = tuple(sites.values())
        refuse_start(start, found)
        ours = {s.name: float(first_match(alphas, _name(s), alpha)) * _times(s) for s in found}
        settings = {
            "rank": rank,
            "alpha": alpha,
            "dropout": float(number(config, "lora_dropout")),
            "rank_stabilised": bool(config.get("use_rslora", False)),
            "start": start if start in OF_BASE else "kaiming",
            "bias_on_B": bool(config.get("lora_bias", False)),
            "rank_pattern": exact_names({s.name: first_match(ranks, _name(s), rank) for s in found}, rank),
            "alpha_pattern": exact_names(ours, alpha),
        }
        return Found(settings, found)


def _obstacle_at(site: Site, method: LoRA) -> str | None:
    layer = site.layer
    if not site.path:
        return "HF PEFT cannot adapt the model itself"
    if isinstance(site.kind, ConvKind):
        layer = cast(nn.Conv2d, layer)
        if layer.groups > 1:
            return "a grouped convolution; HF PEFT's A reads all channels, ours the channels of a group"
        if set(layer.dilation) != {1} or layer.padding_mode != "zeros":
            return "a dilated or not zero-padded convolution, which HF PEFT runs as if it were neither"
    if method.bias_on_B and isinstance(site.kind, EmbeddingKind):
        return "bias_on_B, which HF PEFT refuses on embeddings; set it to False"
    if site.parameter and not _in_attention(site):
        if "." in site.parameter:
            return "a parameter of a module below, which HF PEFT changes only while that module is called"
        if method.dropout:
            return "dropout, which HF PEFT refuses on parameters; set dropout to 0"
    known = isinstance(site.kind, LinearKind | ConvKind | EmbeddingKind) or site.parameter
    return None if known else f"HF PEFT has no LoRA for {type(layer).__name__}"


def _in_attention(site: Site) -> bool:
    return isinstance(site.layer, nn.MultiheadAttention) and site.parameter in ("in_proj_weight", "out_proj.weight")


def _name(site: Site) -> str:
    """The name that HF PEFT's patterns are compared with."""
    return clean(site.path if _in_attention(site) else site.name)


def _their_alpha(method: LoRA, site: Site) -> float:
    return float(next(iter(by_site(method.alpha_pattern, [site]).values()), method.alpha)) / _times(site)


def _times(site: Site) -> int:
    """How often HF PEFT adds the change of this site."""
    return 2 if _in_attention(site) and site.parameter != "in_proj_weight" else 1


def _number(value: float) -> float:
    """Whole numbers without a point, as HF PEFT writes them."""
    return int(value) if value == int(value) else value


def _their_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Their keys are regular expressions on the end of a path; with ^ on all of it."""
    return {"^" + name.replace(".", "\\."): value for name, value in values.items() if value != default}


def _depths(sites: Sequence[Site]) -> dict[str, int]:
    """How many wrappers of HF PEFT's stand around that of each parameter site."""
    depths = {}
    for site in sites:
        if site.parameter and not _in_attention(site):
            here = {s.parameter for s in sites if s.path == site.path}
            order = [name for name in site.layer._parameters if name in here]
            depths[site.name] = len(order) - 1 - order.index(site.parameter)
    return depths


def _stored_at(site: Site, depth: int) -> list[Stored]:
    path = clean(site.path)
    if _in_attention(site) and site.parameter == "out_proj.weight":
        path += ".base_layer.out_proj"
    path += ".base_layer" * depth
    A, B = ("lora_embedding_A", "lora_embedding_B") if isinstance(site.kind, EmbeddingKind) else SUFFIXES[:2]
    keys = [f"{PREFIX}{path}.{name.lstrip('.')}" for name in (A, B)]
    a, b = (site.name, "A"), (site.name, "B")
    if isinstance(site.kind, ConvKind):
        layer = cast(nn.Conv2d, site.layer)
        inside = (layer.in_channels, *layer.kernel_size)
        ones = (1,) * len(layer.kernel_size)
        return [
            Stored(keys[0], (a,), partial(_view, tail=inside), _flat),
            Stored(keys[1], (b,), partial(_view, tail=ones, keep=2), _flat),
        ]
    stack = site.linear.stack
    if stack > 1 and getattr(site.layer, "is_transposed", False):
        # W is (E, in, out): their B_e (out, R) and A_e (R, in) give (B_e A_e)^T = A_e^T B_e^T
        return [
            Stored(keys[0], (b,), partial(_swap, stack=stack), partial(_unswap, stack=stack)),
            Stored(keys[1], (a,), partial(_their_B_of_A, stack=stack), partial(_A_of_their_B, stack=stack)),
        ]
    if stack > 1:
        return [
            Stored(keys[0], (a,)),
            Stored(keys[1], (b,), partial(_pack_B, stack=stack), partial(_unpack_B, stack=stack)),
        ]
    return [Stored(keys[0], (a,)), Stored(keys[1], (b,))]


def _view(tensors: Sequence[Tensor], tail: tuple[int, ...], keep: int = 1) -> Tensor:
    return tensors[0].reshape(*tensors[0].shape[:keep], *tail)


def _flat(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.flatten(1),)


def _pack_B(tensors: Sequence[Tensor], stack: int) -> Tensor:
    B = tensors[0].view(stack, -1, tensors[0].shape[1])  # (E, O, R)
    return B.permute(1, 2, 0).flatten(1)  # (O, R E)


def _unpack_B(tensor: Tensor, stack: int) -> tuple[Tensor]:
    return (tensor.view(tensor.shape[0], -1, stack).permute(2, 0, 1).flatten(0, 1),)  # (E O, R)


def _swap(tensors: Sequence[Tensor], stack: int) -> Tensor:
    return tensors[0].view(stack, -1, tensors[0].shape[1]).transpose(1, 2).flatten(0, 1)  # (E in, R) -> (E R, in)


def _unswap(tensor: Tensor, stack: int) -> tuple[Tensor]:
    return (tensor.view(stack, -1, tensor.shape[1]).transpose(1, 2).flatten(0, 1),)  # (E R, in) -> (E in, R)


def _their_B_of_A(tensors: Sequence[Tensor], stack: int) -> Tensor:
    A = tensors[0].view(stack, -1, tensors[0].shape[1])  # (E, R, out)
    return A.permute(2, 1, 0).flatten(1)  # (out, R E)


def _A_of_their_B(tensor: Tensor, stack: int) -> tuple[Tensor]:
    return (tensor.view(tensor.shape[0], -1, stack).permute(2, 1, 0).flatten(0, 1),)  # (E R, out)


def _site(modules: Modules, path: str, config: Mapping[str, Any]) -> Site | None:
    """The site of a key without its suffix, or None if the model has no such place."""
    parts = path.split(".")
    bare = ".".join(part for part in parts if part != "base_layer")
    parent = bare.rpartition(".")[0]
    if bare.endswith(".out_proj") and parent in modules and isinstance(modules[parent], nn.MultiheadAttention):
        return modules.site(parent, "out_proj.weight")
    if bare not in modules:
        return None
    if isinstance(modules[bare], nn.MultiheadAttention):
        return modules.site(bare, "in_proj_weight") if modules[bare].in_proj_weight is not None else None
    targets = config.get("target_parameters")
    targets = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    names = [f"{bare}.{name}" for name in modules[bare]._parameters]
    order = [name for name in names if any(name == t or name.endswith("." + t) for t in targets)]
    if not order:
        return modules.site(bare) if "base_layer" not in parts else None
    depth = parts.count("base_layer")
    return modules.site(bare, order[-1 - depth].rpartition(".")[2]) if depth < len(order) else None
