"""Does an opened adapter fit this model, agree with itself, and hold numbers?  Each check says all that it finds."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import FolderError
from ..core.fingerprint import fingerprint, same_base
from ..core.method import Method
from ..core.safe import is_intact, read_tensors
from ..core.site import Site
from .config import as_read, config_fields
from .layout import PREFIX, Modules, Stored, Tensors, canonical, clean
from .note import NOTE
from .opened import Opened
from .peft_fields import WITHOUT_EFFECT
from .translation import PeftTranslation, Translation
from .write import CONFIG, finite, kind_name


def check_places(opened: Opened, method: Method, sites: Sequence[Site]) -> None:
    """Raise FolderError where the method cannot act, or the layer is of another kind than it was."""
    wrong = [
        f"{site.name}: {reason}"
        for site in sites
        if site.path and (reason := method.accepts(site))  # the whole model is the method's own affair
    ]
    for site, place in zip(sites, opened.note.sites if opened.note else (), strict=False):
        if kind_name(site) != place.kind:
            here = kind_name(site) or type(site.layer).__name__
            wrong.append(f"{site.name} is {here}, was {place.kind} where it was trained")
    if wrong:
        raise FolderError(f"does not fit this model: {'; '.join(wrong[:5])}")


def check_shapes(opened: Opened, stored: Sequence[Stored], expected: Tensors, translation: Translation) -> list[str]:
    """Raise FolderError on tensors that are missing, of another shape or dtype, or have no place.

    Returns the keys of the copies of the base's own weights that HF PEFT adds.
    """
    problems, known = [], set()
    for entry in stored:
        key = canonical(entry.key)
        known.add(key)
        needed = entry.pack([expected[site][name] for site, name in entry.holds])
        if key not in opened.keys:
            problems.append(f"{key} is missing")
            continue
        found = opened.header.tensors[opened.keys[key]]
        if found.shape != tuple(needed.shape):
            problems.append(f"{key} is {found.shape}, the model and the settings need {tuple(needed.shape)}")
        elif needed.is_floating_point() != (found.dtype in ("F16", "BF16", "F32", "F64")):
            problems.append(f"{key} is {found.dtype}, it should be {needed.dtype}")
    extra = [key for key in opened.keys if key not in known]
    if isinstance(translation, PeftTranslation):
        extra = [key for key in extra if translation.repeats(key) not in known]
    copies = [key for key in extra if opened.note is None and _original(opened, key) is not None]
    problems += [f"{key[:200]} has no place" for key in extra if key not in copies]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise FolderError(
            f"does not fit this model. {len(problems)} of {len(opened.header.tensors)} tensors: "
            f"{'; '.join(problems[:8])}{more}. {opened.trained_on()}"
        )
    return copies


def check_agreement(
    opened: Opened, method: Method, sites: Sequence[Site], heads: Sequence[Site], *, theirs: bool
) -> None:
    """Raise FolderError if adapter_config.json says other settings than smidgen.json."""
    config, ours = opened.config, as_read(config_fields(opened.modules, method, sites, heads, theirs=theirs))
    differ = [
        f"{field} ({str(config[field])[:60]}, {str(ours.get(field))[:60]})"
        for field in config
        if field not in WITHOUT_EFFECT and config[field] != ours.get(field) and (field in ours or config[field])
    ]
    if differ:
        raise FolderError(f"{CONFIG} and {NOTE} disagree on {', '.join(differ[:8])}: one of them was changed by hand")


def check_base(opened: Opened, heads: Sequence[Site]) -> None:
    """Raise FolderError if the model has other weights than the adapter was trained on, as far as the folder says."""
    expected = opened.note.base.get("fingerprint") if opened.note else None
    if not isinstance(expected, str):
        return
    found = fingerprint(opened.modules.model, leave_out=[clean(site.name) for site in heads])
    if not same_base(expected, found):
        raise FolderError(
            f"fits this model in shape, but was trained on other weights (fingerprint {expected[:80]}, "
            f"this model has {found}). {opened.trained_on()} If that is meant: load(..., check_base=False)"
        )


def read_checked(opened: Opened, names: Iterable[str]) -> dict[str, Tensor]:
    """Read these tensors.  Raises FolderError if one is not the one that was written, or not finite."""
    problems = []

    def look(name: str, tensor: Tensor) -> None:
        if opened.note is not None and not is_intact(tensor, opened.note.tensors.get(name)):
            problems.append(f"{name} is damaged")
        elif not finite(tensor):
            problems.append(f"{name} holds NaN or infinity")

    read = read_tensors(opened.weights, opened.header, names, look)
    if problems:
        raise FolderError(f"{opened.weights}: {len(problems)} of {len(read)} tensors: {'; '.join(problems[:8])}")
    return read


def check_copies(opened: Opened, copies: Sequence[str]) -> None:
    """Raise FolderError if what HF PEFT copied from its base is not what the model has: it was trained or resized."""
    for key in copies:
        raw = opened.keys[key]
        copy, own = read_tensors(opened.weights, opened.header, [raw])[raw], cast(Tensor, _original(opened, key))
        dtype = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(copy.to(dtype), own.detach().cpu().to(dtype)):
            raise FolderError(
                f"{raw} differs from the model's own: the base was changed when the adapter was trained. "
                "Load the base that it belongs to"
            )


def _original(opened: Opened, key: str) -> Tensor | None:
    """The base's own tensor that a key of HF PEFT's is a copy of: of wrapped layers, and of embeddings."""
    path, _, name = key.removeprefix(PREFIX).rpartition(".")
    layer = opened.modules.get(path.removesuffix(".base_layer"))
    if layer is None or not (path.endswith(".base_layer") or layer in _embeddings(opened.modules)):
        return None
    tensor = layer._parameters.get(name)
    return tensor if tensor is not None and tuple(tensor.shape) == opened.shape(key) else None


def _embeddings(modules: Modules) -> list[nn.Module]:
    """Of transformers' models: HF PEFT writes these whole if the vocabulary was resized."""
    model: Any = modules.model
    try:
        return [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
