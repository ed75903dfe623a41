"""Read the folders of pyreft: config.json and a pickle of one state dict for each intervention, intkey_<key>.bin.

    representations     [[layer, component, unit, number of units, rank, ...], ...]
    intervention_types  "<class 'pyreft.interventions.LoreftIntervention'>", ...
    <key>               layer_<n>_comp_<component>_unit_pos_nunit_1#<i>: of a layer's two, #0 is for the first tokens

The state dicts hold weight (r, D), bias (r,), and rotate_layer (D, r) or proj_layer.weight (r, D); of DiReFT, the
rotation as torch's parametrization keeps it.
Which tokens the interventions act on stands in the user's own code and not in the folder, so it has to be added.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..core.blocks import blocks
from ..core.errors import FolderError
from ..core.method import method_named
from ..core.positions import first_and_last
from ..core.safe import read_json
from ..core.targets import Targets
from ..methods.loreft import ReFT
from .imported import Imported
from .layout import Modules

_METHODS = {"Loreft": "loreft", "Noreft": "noreft", "Direft": "direft", "Nodireft": "direft"}
_ROTATION = {f"rotate_layer.parametrizations.weight.{end}" for end in ("original", "0.base")}
_LINK = 9  # the place of intervention_link_key in a representation


def read(folder: Path, modules: Modules) -> list[Imported]:
    """The adapter in the folder.  Raises FolderError."""
    config = read_json(folder / "config.json")
    kinds, keys, layers = _interventions(config)
    named = method_named(_METHODS[kinds.pop()])
    places = _places(modules, layers)
    positions = _positions(config)
    both = positions is not None and all(positions)
    most = max(Counter(places).values())
    if most > (2 if both else 1) or len(places) != most * len(set(places)):
        raise FolderError(
            f'has {most} interventions at a block, and positions is "{config["positions"]}": there has to be one at '
            'every block, or with "f<n>+l<m>" two'
        )
    tensors: dict[tuple[str, str], Tensor] = {}
    for key, path in zip(keys, places, strict=True):
        unit = "every" if most == 1 else "last" if (path, "first.W") in tensors else "first"
        tensors |= {(path, f"{unit}.{name}"): value for name, value in _unit(folder / f"intkey_{key}.bin").items()}
    rank = len(next(value for (_, name), value in tensors.items() if name.endswith(".b")))
    method = cast("type[ReFT]", named)(
        targets=Targets.exactly(places), rank=rank, positions=config["positions"], share_weights=both and most == 1
    )
    return [Imported(name="default", method=method, sites=method.resolve(modules.model).sites, tensors=tensors)]


def _interventions(config: dict[str, Any]) -> tuple[set[str], list[str], list[tuple[Any, str]]]:
    """The kinds, the keys of the files, and (layer, component) of each."""
    rows, types = config.get("representations"), config.get("intervention_types")
    whole = isinstance(rows, list) and isinstance(types, list) and len(rows) == len(types) > 0
    if not whole or not all(isinstance(row, list) and len(row) > _LINK for row in cast("list[Any]", rows)):
        raise FolderError("config.json has no representations with as many intervention_types")
    kinds = {str(kind).rpartition(".")[2].removesuffix("'>").removesuffix("Intervention") for kind in cast(Any, types)}
    other = kinds - _METHODS.keys()
    if other or len({_METHODS[kind] for kind in kinds}) > 1:
        known = ", ".join(_METHODS)
        raise FolderError(f"has interventions {', '.join(sorted(kinds))[:200]}; read are those of one kind of {known}")
    seen: Counter[str] = Counter()
    keys, layers = [], []
    for row in cast("list[list[Any]]", rows):
        layer, component, unit, count = row[:4]
        if row[_LINK] is not None:  # they share what comes out, not the weights
            raise FolderError("links interventions to each other, which is not done here")
        if unit != "pos" or count != 1 or not isinstance(component, str) or not re.fullmatch(r"[\w.\[\]]+", component):
            raise FolderError(f"intervenes on {str(component)[:80]!a} by {str(unit)[:20]!a}; read are positions")
        place = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
        key = f"{place}_unit_pos_nunit_1"
        keys.append(f"{key}#{seen[key]}")
        seen[key] += 1
        layers.append((layer, component))
    return kinds, keys, layers


def _places(modules: Modules, layers: list[tuple[Any, str]]) -> list[str]:
    found, places = blocks(modules.model), []
    for layer, component in layers:
        spelt = re.fullmatch(r"([\w.]+)\[(\d+)\]\.output", component)  # model.layers[3].output
        if spelt and f"{spelt[1]}.{spelt[2]}" in modules:
            places.append(f"{spelt[1]}.{spelt[2]}")
        elif component == "block_output" and type(layer) is int and 0 <= layer < len(found):
            places.append(found[layer])
        else:
            raise FolderError(
                f"intervenes at layer {str(layer)[:20]}, {component[:80]!a}, which is none of the {len(found)} blocks "
                "of this model; read are block_output and <path>[<n>].output"
            )
    return places


def _positions(config: dict[str, Any]) -> tuple[int, int] | None:
    try:
        return first_and_last(str(config["positions"]))
    except (KeyError, ValueError):
        raise FolderError(
            "does not say which tokens it acts on; pyreft leaves that to the code around it. Add what it was trained "
            'with to its config.json, for example "positions": "f1+l1", or "f7+l7", "l1", "all"'
        ) from None


def _unit(path: Path) -> dict[str, Tensor]:
    from .pickled import read_pickled  # here: only foreign folders need it

    state = {key.removeprefix("learned_source."): tensor for key, tensor in read_pickled(path).items()}
    own = {"W": state.get("weight"), "b": state.get("bias"), "P": state.get("proj_layer.weight")}
    used = {"weight", "bias", "proj_layer.weight", "embed_dim", "interchange_dim"}
    if "rotate_layer" in state:
        own["P"], used = state["rotate_layer"].mT, used | {"rotate_layer"}
    elif state.keys() >= _ROTATION:
        own["P"], used = orthogonal(*(state[key] for key in sorted(_ROTATION, reverse=True))).mT, used | _ROTATION
    found = {name: tensor for name, tensor in own.items() if tensor is not None}
    if len(found) < len(own) or state.keys() - used:
        raise FolderError(f"{path.name} holds {', '.join(state)[:200]}; read are weight, bias and one projection")
    return found


def orthogonal(original: Tensor, base: Tensor) -> Tensor:
    """The matrix that torch's parametrization `orthogonal` makes of these two, in the shape of the first."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.eye(*original.shape))
    parametrizations.orthogonal(holder)
    state = {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    holder.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return cast(Tensor, holder.weight).detach()
