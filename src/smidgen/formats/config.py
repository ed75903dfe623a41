"""adapter_config.json: the fields, and whether Hugging Face PEFT can read what we would write."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..core.method import Method
from ..core.site import Site
from .layout import Modules, clean
from .peft_fields import FIELDS, TASK_HEADS
from .translation import PeftTranslation
from .translations import translation_of


def config_fields(
    modules: Modules, method: Method, sites: Sequence[Site], heads: Sequence[Site], *, theirs: bool
) -> dict[str, Any]:
    """adapter_config.json, but for the name of the base and the task."""
    translation = translation_of(type(method))
    if theirs:
        assert isinstance(translation, PeftTranslation)
        own = translation.fields(modules, method, sites)
        common = {"modules_to_save": _tops(modules, heads) or None, "peft_type": translation.peft_type}
        if bias := _bias(modules, method, sites, heads):
            common["bias"] = bias
        return {**FIELDS[translation.peft_type], **own, **common}
    settings = translation.settings(method, sites)
    fields = {method.disk.fields.get(name, name): value for name, value in settings.items()}
    return {"peft_type": f"SMIDGEN_{method.name.upper()}", **fields}


def peft_obstacle(
    modules: Modules, method: Method, sites: Sequence[Site], heads: Sequence[Site], task: str | None
) -> str | None:
    """Why HF PEFT's layout cannot hold this adapter, or None if it can."""
    translation = translation_of(type(method))
    if not isinstance(translation, PeftTranslation):
        return f"HF PEFT has no method like {method.name}"
    reason = translation.obstacle(modules, method, sites)
    if reason is None and translation.needs_task and task is None:
        reason = "without task_type HF PEFT ignores it; with it, it expects the task's head in the file"
    if reason is None and any(site.parameter for site in heads) and not _bias(modules, method, sites, heads):
        reason = "of single parameters it trains all biases, those of the adapted layers, or none"
    if reason is None and heads:
        tops = tuple(_tops(modules, heads))
        inside = tuple(f"{top}." for top in tops)
        more = [path for path in modules if path.endswith(tops) and path not in tops and not path.startswith(inside)]
        if more:  # their rule, without a dot between: "classifier" is "pre_classifier" too
            reason = f"{more[0]} ends like {', '.join(tops)}, so HF PEFT would expect it in the file as well"
    return reason


def _tops(modules: Modules, heads: Sequence[Site]) -> list[str]:
    """The fewest modules that hold these heads and no other parameters: HF PEFT's modules_to_save."""
    leaves = {clean(site.path) for site in heads if site.parameter is None}
    owners = [path for path in modules if any(p is not None for p in modules[path]._parameters.values())]
    tops = set()
    for leaf in leaves:
        top = leaf
        while (parent := top.rpartition(".")[0]) and all(p in leaves for p in owners if _within(p, parent)):
            top = parent
        tops.add(top)
    return sorted(tops)


def _bias(modules: Modules, method: Method, sites: Sequence[Site], heads: Sequence[Site]) -> str | None:
    """HF PEFT's `bias`, which trains the biases of the adapted layers or of all; None where neither is meant."""
    trained = {clean(site.name) for site in heads if site.parameter}
    if not trained or "bias" not in FIELDS[method.disk.peft_type]:
        return None
    biased = {path for path in modules if modules[path]._parameters.get("bias") is not None}
    own = {f"{clean(site.path)}.bias" for site in sites if clean(site.path) in biased}
    if trained == own:
        return f"{method.name}_only"
    return "all" if trained == {f"{path}.bias".lstrip(".") for path in biased} else None


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")


def expects_more(modules: Modules, heads: Sequence[Site], task_type: str | None) -> bool:
    """True if HF PEFT, told this task, would look for modules in the file that are not there."""
    ends = TASK_HEADS.get(task_type or "", ())
    tops = _tops(modules, heads) if ends else []
    return any(path.endswith(ends) and not any(_within(path, top) for top in tops) for path in modules if ends)


def as_read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as they are once written and read: tuples are lists."""
    return cast("dict[str, Any]", json.loads(json.dumps(fields)))
