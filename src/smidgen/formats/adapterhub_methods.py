"""What the tensors of each of AdapterHub's architectures are to us.

    None             bottleneck, compacter and invertible     adapters, shared_parameters, invertible_adapters
    "lora"           LoRA, or IA3 where it scales             loras
    "prefix_tuning"  PrefixTuning, its MLP computed           prefix_tunings
    "reft"           LoReFT, NoReFT, DiReFT                   refts

All functions raise FolderError for what they cannot follow.
"""

from collections.abc import Callable

import torch

from ..core.errors import FolderError
from ..core.non_linearity import FUNCTIONS
from ..core.targets import Targets
from ..methods.direft import DiReFT
from ..methods.ia3 import IA3
from ..methods.lora import LoRA
from ..methods.loreft import LoReFT, ReFT
from ..methods.noreft import NoReFT
from ..methods.prefix_tuning import PrefixTuning
from .adapterhub import POST_NORM, Named, Saved, activation, imported
from .adapterhub_bottlenecks import bottlenecks
from .imported import Imported
from .pyreft import orthogonal
from .translation import as_number


def loras(name: str, saved: Saved) -> list[Imported]:
    """LoRA, or IA3 where it scales."""
    saved.require({"use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None})
    scales = saved.config.get("composition_mode") == "scale"
    rank, alpha = (as_number(saved.config.get(field), field) for field in ("r", "alpha"))
    tensors: Named = {}
    ranks: dict[str, int] = {}
    for owner, own in saved.of("loras").items():
        if own.keys() != ({"lora_B"} if scales else {"lora_A", "lora_B"}):
            raise FolderError(f"{owner} holds {', '.join(own)[:200]}, which cannot be read")
        path, B = saved.path(owner), own["lora_B"]
        site = saved.modules.site(path)
        slices = _slices(saved, site.fan_out, B.shape[0])
        if scales:
            l = torch.ones(site.fan_out)
            for rows, part in zip(slices, B.flatten().chunk(len(slices)), strict=True):
                l[rows] = part * alpha
            tensors[path, "l"] = l[:, None]
            continue
        count = len(slices) if B.shape[0] != site.fan_out or own["lora_A"].shape[0] != rank else 1
        if count > 1 or B.shape[0] != site.fan_out:  # queries, keys and values apart, in one layer
            wide = B.new_zeros(site.fan_out, count * rank)
            for number, (rows, part) in enumerate(zip(slices, B.chunk(count), strict=True)):
                wide[rows, number * rank : (number + 1) * rank] = part
            B = wide
        tensors[path, "A"], tensors[path, "B"] = own["lora_A"], B
        ranks[path] = count * rank
    targets = Targets.exactly({path for path, _ in tensors})
    if scales:
        return [imported(name, saved, IA3(targets=targets, feedforward=()), tensors)]
    wider = {path: own for path, own in ranks.items() if own != rank}
    method = LoRA(
        targets=targets,
        rank=rank,
        alpha=alpha,
        dropout=as_number(saved.config.get("dropout", 0.0), "dropout"),
        rank_pattern=wider,
        alpha_pattern={path: alpha * own / rank for path, own in wider.items()},
    )
    return [imported(name, saved, method, tensors)]


def _slices(saved: Saved, fan_out: int, height: int) -> list[slice]:
    """Which rows of a layer a tensor of this height is for: all, or those of queries, keys, values that it has."""
    there = [matrix in (saved.config.get("attn_matrices") or []) for matrix in "qkv"]
    third = fan_out // 3
    if height == fan_out and not all(there):
        return [slice(0, fan_out)]
    return [slice(third * i, third * (i + 1)) for i in range(3) if there[i]]


def prefixes(name: str, saved: Saved) -> list[Imported]:
    """Keys and values, as the MLP makes them where there is one."""
    saved.require({"use_gating": False, "dropout": 0.0})
    if saved.family not in POST_NORM:
        raise FolderError(f"has a prefix for {saved.family}; read are those for {', '.join(POST_NORM)}")
    own = next(iter(saved.of("prefix_tunings").values()), {})
    own = {key.removeprefix("self_prefix.control_trans").lstrip("."): tensor for key, tensor in own.items()}
    length = as_number(saved.config.get("prefix_length"), "prefix_length", whole=True)
    method = PrefixTuning(length=length)
    sites = method.resolve(saved.modules.model).sites
    if saved.config.get("flat"):
        all_of = own[""]
    else:
        h = torch.addmm(own["0.bias"], own["self_prefix.wte.weight"], own["0.weight"].T)
        all_of = torch.addmm(own["2.bias"], FUNCTIONS[activation(saved)](h), own["2.weight"].T)
    pairs = all_of.view(length, 2 * len(sites), -1).unbind(1)
    tensors = {(site.name, end): pairs[2 * i + j] for i, site in enumerate(sites) for j, end in enumerate("KV")}
    return [imported(name, saved, method, tensors)]


def refts(name: str, saved: Saved) -> list[Imported]:
    """LoReFT, NoReFT or DiReFT."""
    config = saved.config
    kind: type[ReFT] = LoReFT
    if not config.get("orthogonality"):
        if not isinstance(config.get("subtract_projection"), bool):
            raise FolderError(
                "is of NoReFT or of DiReFT: AdapterHub writes the same config for both. Add what it is to it: "
                '"subtract_projection": true for NoReFT, false for DiReFT'
            )
        kind = NoReFT if config["subtract_projection"] else DiReFT
    first, last = (as_number(config.get(f"{end}_positions"), end, whole=True) for end in ("prefix", "suffix"))
    tied = bool(config.get("tied_weights"))
    places = [f"{mark}{count}" for mark, count in (("f", first), ("l", last)) if count]
    names = {0: "every"} if tied else {0: "first", 1: "last"} if len(places) == 2 else {0 if first else 1: "every"}
    tensors: Named = {}
    for owner, own in saved.of("refts").items():
        block, _ = saved.block(owner)
        for number, unit in names.items():
            prefix = f"units.{number}."
            state = {key.removeprefix(prefix): tensor for key, tensor in own.items() if key.startswith(prefix)}
            P = state.get("projection.weight")
            if P is None:
                ends = ("original", "0.base")
                P = orthogonal(*(state[f"projection.parametrizations.weight.{end}"] for end in ends))
            tensors[block, f"{unit}.P"] = P
            tensors[block, f"{unit}.W"] = state["learned_source.weight"]
            tensors[block, f"{unit}.b"] = state["learned_source.bias"]
    method = kind(
        targets=Targets.exactly({path for path, _ in tensors}),
        rank=as_number(config.get("r"), "r", whole=True),
        positions="+".join(places),
        share_weights=tied and len(places) == 2,
        dropout=as_number(config.get("dropout", 0.0), "dropout"),
        non_linearity=None if config.get("non_linearity") is None else activation(saved),
    )
    return [imported(name, saved, method, tensors)]


READERS: dict[str | None, Callable[[str, Saved], list[Imported]]] = {
    None: bottlenecks,
    "lora": loras,
    "prefix_tuning": prefixes,
    "reft": refts,
}
