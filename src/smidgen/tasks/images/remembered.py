"""What a detector knew stays what it was while it learns: its scores of classes that nobody marked, and its boxes.

    loss + g (mean (s - s0)^2 + mean (d - d0)^2)

s: (N, classes, A) logits of the old classes that no training row marks.   d: (N, 4 R, A), what boxes are made of.
s0, d0: the untouched detector's, on the same images.

Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282), for detectors as in Shmelkov, Schmid and Alahari 2017
(arXiv:1708.06977, section 3.2): squared differences of logits and of what boxes are regressed by.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import adapters_of
from .batch_statistics import at_rest

WEIGHT = 0.1  # g: docs/decisions/0022-a-detector-is-held-to-what-it-knew.md


def forgetting(body: nn.Module, images: Tensor, raw: Any, classes: Tensor) -> Tensor | None:
    """By how much what the head gives has left what it gave without adapters; None where no adapter is being trained.

    raw: {"scores": (N, K, A), "boxes": (N, 4 R, A)} with a way back, or several of these by name.
    classes: (K,), true for those to remember.
    """
    adapters = adapters_of(body)
    if adapters is None or not torch.is_grad_enabled() or not any(p.requires_grad for p in adapters.parameters()):
        return None
    with adapters.off(), at_rest(body), torch.no_grad():
        _, before = body(images)
    return WEIGHT * _drift(raw, before, classes)


def _drift(now: Any, before: Any, classes: Tensor) -> Tensor:
    if "scores" not in now:
        return torch.stack([_drift(branch, before[name], classes) for name, branch in now.items()]).sum()
    scores: Tensor = now["scores"] - before["scores"]
    boxes: Tensor = now["boxes"] - before["boxes"]
    return scores[:, classes].float().square().mean() + boxes.float().square().mean()
