"""How a model sees images: of which size, and by which means and deviations; from what its authors say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import RecipeError
from ...data.images import Fit

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_SIDE = 224
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How a model sees images: x = (pixels / 255 - mean) / std, of a size.   why: who says so."""

    fit: Fit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    why: str = ""


def seen_by_processor(said: Mapping[str, Any]) -> Seen:
    """From the fields of a preprocessor_config.json of transformers."""
    size, cut = said.get("size") or _SIDE, said.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size} if cut and said.get("do_center_crop") else {"height": size, "width": size}
    if isinstance(cut, int):
        cut = {"height": cut, "width": cut}
    shortest = size.get("shortest_edge")
    if cut and said.get("do_center_crop"):
        height, width = cut["height"], cut["width"]
        shortest = shortest or min(size["height"], size["width"])
    elif shortest:
        # ConvNeXt and ResNet: resized so that a share of the short side is cut out, at sizes below 384
        height = width = shortest
        shortest = int(shortest / (said.get("crop_pct") or 0.875)) if shortest < 384 else None
    else:
        height, width = size.get("height", _SIDE), size.get("width", _SIDE)
    factor = 255 * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0)
    offset = 1.0 if said.get("rescale_offset") else 0.0  # (x * factor - offset - mean) / std, with x in 0..1
    normalises = said.get("do_normalize", True)
    mean = (said.get("image_mean") or _MEAN) if normalises else (0.0,) * 3
    std = (said.get("image_std") or _STD) if normalises else (1.0,) * 3
    resample = said.get("resample", 2)
    fit = Fit(height=height, width=width, shortest=shortest, channels=len(mean), resample=int(resample))
    folded_mean = tuple((float(m) + offset) / factor for m in mean)
    return Seen(
        fit=fit, mean=folded_mean, std=tuple(float(s) / factor for s in std), why="its preprocessor_config.json"
    )


def seen_by_timm(said: Mapping[str, Any]) -> Seen:
    """From a `pretrained_cfg` of timm; 224 pixels and ImageNet's numbers for what it does not say."""
    mean, std = said.get("mean") or _MEAN, said.get("std") or _STD
    _, height, width = said.get("input_size") or (3, _SIDE, _SIDE)
    share = float(said.get("crop_pct") or 1.0)
    shortest = int(min(height, width) / share) if share < 1 and said.get("crop_mode", "center") == "center" else None
    resample = _FILTERS.get(str(said.get("interpolation", "bilinear")), 2)
    fit = Fit(height=height, width=width, shortest=shortest, channels=len(mean), resample=resample)
    why = "its pretrained_cfg" if said else "nobody says: ImageNet's"
    return Seen(fit=fit, mean=tuple(map(float, mean)), std=tuple(map(float, std)), why=why)


def with_said(seen: Seen, size: int | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Seen:
    """The same with what the recipe says instead.  Raises RecipeError if mean and std do not go together."""
    mean, std = mean or seen.mean, std or seen.std
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
        raise RecipeError(f"task.mean {mean} and task.std {std}: 3 numbers each (RGB) or 1 (grey), std above 0")
    fit = replace(seen.fit, channels=len(mean))
    if size is not None:
        shortest = fit.shortest and round(fit.shortest * size / min(fit.height, fit.width))
        fit = replace(fit, height=size, width=size, shortest=shortest)
    return replace(seen, fit=fit, mean=tuple(mean), std=tuple(std))
