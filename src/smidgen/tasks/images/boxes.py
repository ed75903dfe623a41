"""Boxes: how much two overlap, which of many to keep, and mean average precision as COCO defines it.

    AP(class, t) = mean over r = 0, 0.01 .. 1 of  max { precision(score cut) : recall(score cut) >= r }
    mAP50 = mean over classes of AP at t = 0.5          mAP50-95 = mean over classes and t = 0.5, 0.55 .. 0.95

A detection is right at t if it has an overlap (IoU) of t or more with a true box of its class in its image that no
detection of a higher score took; it takes the one with which it overlaps most.  At most `count` detections an image
count, of all classes together.  Lin et al. 2014, arXiv:1405.0312, and pycocotools 2.0, cocoeval.py.

Boxes are x1, y1, x2, y2 in pixels.   Detections: (N, D, 6), box, score, class, the best first, padded with -1.
True boxes: (N, G, 5), class and box, padded with -1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = tuple((50 + 5 * i) / 100 for i in range(10))  # of IoU
SUPPRESSED = 0.7  # IoU above which the lower of two boxes of one class goes
CANDIDATES = 500  # detections of an image that are compared with each other
LOWEST = 1e-3  # score below which nothing is a detection


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each with each: a (..., n, 4), b (..., m, 4) -> (..., n, m)."""
    corner = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:]) - torch.maximum(
        a[..., :, None, :2], b[..., None, :, :2]
    )
    shared = corner.clamp(min=0).prod(-1)
    area_a, area_b = ((boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (a, b))
    return shared / (area_a[..., :, None] + area_b[..., None, :] - shared).clamp(min=1e-9)


def detections(boxes: Tensor, scores: Tensor, count: int, *, suppress: bool) -> Tensor:
    """The `count` best detections of each image, (N, count, 6).

    boxes: (N, A, 4).   scores: (N, A, K); a box may be one of several classes.
    suppress: drop boxes that overlap a better one of their class (greedy non-maximum suppression).
    """
    classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(scores[0].numel(), CANDIDATES if suppress else count))
    chosen = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    label = index % classes
    keep = best >= LOWEST
    if suppress:
        keep &= _not_suppressed(chosen, label, keep)
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]  # the kept ones first, still by score
    found = torch.cat([chosen, best[..., None], label[..., None].to(best.dtype)], dim=-1)
    found = torch.where(keep[..., None], found, -1.0).gather(1, order[..., None].expand(-1, -1, 6))
    return F.pad(found, (0, 0, 0, count - found.shape[1]), value=-1.0)


def _not_suppressed(boxes: Tensor, label: Tensor, there: Tensor) -> Tensor:
    """What greedy suppression keeps, (N, n); boxes (N, n, 4) by falling score.

    A box goes if one before it, which stays itself, overlaps it: the one solution of that is reached from any start,
    after as many rounds as boxes push each other away in a chain.
    """
    above = (overlaps(boxes, boxes) > SUPPRESSED) & (label[:, :, None] == label[:, None, :])
    above = above.triu(diagonal=1)
    keep = there
    while True:
        after = there & ~(above & keep[:, :, None]).any(1)
        if torch.equal(after, keep):
            return keep
        keep = after


def hits(found: Tensor, targets: Tensor) -> Tensor:
    """At which thresholds each detection is right: (N, D), a whole number whose bit t is THRESHOLDS[t].

    found: (N, D, 6).   targets: (N, G, 5).
    """
    count = found.shape[1]
    result = torch.zeros(found.shape[:2], dtype=torch.int64, device=found.device)
    if not targets.shape[1] or not bool((found[..., 4] >= 0).any()):
        return result
    least = torch.tensor(THRESHOLDS, dtype=torch.float64, device=found.device).clamp(max=1 - 1e-10)[:, None]
    iou = overlaps(found[..., :4].double(), targets[..., 1:].double())  # (N, D, G)
    iou = torch.where(found[..., 5, None] == targets[:, None, :, 0], iou, -1.0)
    iou = torch.where((found[..., 4, None] >= 0) & (targets[:, None, :, 0] >= 0), iou, -1.0)
    free = torch.ones(len(found), len(THRESHOLDS), targets.shape[1], dtype=torch.bool, device=found.device)
    bits = 2 ** torch.arange(len(THRESHOLDS), device=found.device)
    last = int((found[..., 4] >= 0).sum(1).max())
    for d in range(min(last, count)):
        open_to = torch.where(free & (iou[:, d, None] >= least), iou[:, d, None], -1.0)  # (N, T, G)
        best, which = open_to.flip(-1).max(-1)  # of equal ones the last, as pycocotools
        right = best >= 0
        taken = F.one_hot(targets.shape[1] - 1 - which, targets.shape[1]).bool()
        free &= ~(taken & right[..., None])
        result[:, d] = (right * bits).sum(1)
    return result


def average_precision(scores: Tensor, labels: Tensor, right: Tensor, true: Tensor, classes: int) -> Tensor:
    """AP by threshold and class, (T, K) in fp64; NaN for classes without a true box.

    scores, labels, right: (N, D) of the detections, right as `hits`; below 0 are padding.   true: (N, G) classes of
    the true boxes, -1 where there is none.
    """
    counts = torch.bincount(true[true >= 0].long(), minlength=classes)
    there = scores >= 0
    scores, labels, right = scores[there], labels[there].long(), right[there].long()
    order = scores.argsort(descending=True, stable=True)
    labels = labels[order]
    is_right = (right[order] >> torch.arange(len(THRESHOLDS))[:, None]) & 1  # (T, M)
    recalls = (torch.arange(101, dtype=torch.float64) * 0.01).repeat(len(THRESHOLDS), 1)
    result = torch.full((len(THRESHOLDS), classes), torch.nan, dtype=torch.float64)
    for label in (counts > 0).nonzero()[:, 0].tolist():
        found = is_right[:, labels == label].double().cumsum(1)
        recall = found / counts[label]
        precision = found / torch.arange(1, found.shape[1] + 1, dtype=torch.float64)
        precision = precision.flip(1).cummax(1).values.flip(1) if found.shape[1] else precision
        at = torch.searchsorted(recall, recalls)
        result[:, label] = F.pad(precision, (0, 1)).gather(1, at).mean(1)  # 0 where the recall is never reached
    return result
