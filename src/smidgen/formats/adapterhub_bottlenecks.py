"""What the tensors of AdapterHub's bottlenecks are to us: a bottleneck or compacter, and its invertible adapter."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.blocks import attentions, feedforwards
from ..core.errors import FolderError
from ..core.targets import Targets
from ..methods.bottleneck import Bottleneck
from ..methods.compacter import Compacter
from ..methods.invertible import Invertible
from .adapterhub import POST_NORM, Named, Saved, activation, imported
from .imported import Imported
from .translation import as_number

_BOTTLENECK: dict[str, Any] = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "adapter_residual_before_ln": False,
    "residual_before_ln": True,
    "use_gating": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "stochastic_depth": 0.0,
}
_COMPACTER: dict[str, Any] = {
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_bias": True,
}
_TENSORS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_down.0.W_left": "down_left",
    "adapter_down.0.W_right": "down_right",
    "adapter_down.0.b": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "adapter_up.W_left": "up_left",
    "adapter_up.W_right": "up_right",
    "adapter_up.b": "up_bias",
}


def bottlenecks(name: str, saved: Saved) -> list[Imported]:
    """A bottleneck or compacter, and the invertible adapter that belongs to it."""
    saved.require(_BOTTLENECK)
    phm = bool(saved.config.get("phm_layer"))
    if phm:
        saved.require(_COMPACTER)
    placement, places = _places(saved)
    tensors: Named = {}
    for owner, own in saved.of("adapters").items():
        tensors |= {(places[owner][end.startswith("up")], f"net.{end}"): t for end, t in _network(owner, own).items()}
    widths = {len(tensor) for (_, end), tensor in tensors.items() if end == "net.down_bias"}
    if len(widths) != 1:
        raise FolderError(f"has adapters of widths {', '.join(map(str, sorted(widths)))}; one is read")
    scale = saved.config.get("scaling", 1.0)
    settings: dict[str, Any] = {
        "targets": Targets.exactly({place for pair in places.values() for place in pair}),
        "placement": placement,
        "width": widths.pop(),
        "non_linearity": activation(saved),
        "scale": 1.0 if isinstance(scale, str) else as_number(scale, "scaling"),  # a learned one is in U and u
    }
    if not phm:
        return [imported(name, saved, Bottleneck(**settings), tensors), *_invertible(name, saved)]
    rules = [own.get("phm_rule") for own in saved.of("shared_parameters").values()]
    if len(rules) != 1 or rules[0] is None:  # a folder that was saved of a model without a head lacks it
        raise FolderError("has no phm_rule, which all its layers share; save it again from a model with a head")
    rank = next(tensor.shape[-1] for (_, end), tensor in tensors.items() if end == "net.down_left")
    method = Compacter(**settings, rank=rank, kronecker=len(rules[0]))
    first = method.resolve(saved.modules.model).sites[0]
    return [imported(name, saved, method, {**tensors, (first.name, "shared.A"): rules[0]}), *_invertible(name, saved)]


def _network(owner: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    strange = own.keys() - _TENSORS.keys() - {"scaling"}
    if strange:
        raise FolderError(f"{owner} holds {', '.join(strange)[:200]}, which has no place")
    found = {_TENSORS[key]: tensor for key, tensor in own.items() if key != "scaling"}
    if "scaling" in own:  # learned: one number, or one for each feature
        s = own["scaling"]
        found["up_bias"] = found["up_bias"] * s
        if "up" in found:
            found["up"] = found["up"] * s[:, None]
        else:
            raise FolderError("a compacter with learned scaling is not read")
    return found


def _places(saved: Saved) -> tuple[str, dict[str, tuple[str, str]]]:
    """Our placement, and for every owner where its D and its U go, which is one place but for parallel adapters."""
    model, places = saved.modules.model, {}
    normed, parallel = bool(saved.config.get("original_ln_before")), bool(saved.config.get("is_parallel"))
    post_norm, in_attention = saved.family in POST_NORM, False
    for owner in saved.of("adapters"):
        block, rest = saved.block(owner)
        attention = rest.startswith("attention")
        in_attention |= attention
        inner = attentions(model) if attention else feedforwards(model)
        part = next((part for part in inner if part.path == block or part.path.startswith(f"{block}.")), None)
        if part is None or (parallel and (attention or not post_norm)) or (normed and attention and not post_norm):
            raise FolderError(
                f"{owner} of {saved.family} reads what no module gives there; parallel adapters are read for "
                f"{', '.join(POST_NORM)}"
            )
        if parallel:
            places[owner] = (part.inputs[0], part.output)  # type: ignore[union-attr]
        elif normed:
            norm = f"{part.output.rpartition('.')[0]}.LayerNorm" if post_norm else block
            places[owner] = (norm, norm)
        else:
            places[owner] = (part.output, part.output)
    placement = "parallel" if parallel else "normed" if normed else "both" if in_attention else "feedforward"
    return placement, places


def _invertible(name: str, saved: Saved) -> list[Imported]:
    kind = saved.config.get("inv_adapter")
    if not kind:
        return []
    if kind != "nice":
        raise FolderError(f"inv_adapter is {str(kind)[:80]!a}; theirs couples positions, not features: read is nice")
    factor = as_number(saved.config.get("inv_adapter_reduction_factor"), "inv_adapter_reduction_factor")
    places = Invertible().auto(saved.modules.model)[0]
    method = Invertible(
        targets=Targets.exactly(places if saved.undone else places[:1]),
        reduction_factor=factor,
        non_linearity=activation(saved),
    )
    ends = {"0.weight": "down", "0.bias": "down_bias", "2.weight": "up", "2.bias": "up_bias"}
    own = next(iter(saved.of("invertible_adapters").values()), {})
    first = method.resolve(saved.modules.model).sites[0]
    named = {(first.name, f"shared.{_half(key)}.{ends.get(key[2:], key)}"): tensor for key, tensor in own.items()}
    return [imported(name, saved, method, named)]


def _half(key: str) -> str:
    return {"F": "first", "G": "last"}.get(key[:1], key)
