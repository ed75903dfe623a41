"""What a detector found in images, kept to be judged: boxes, their scores and classes, and whether they are right.

An answer is (100, 7) numbers: box, score, class, and at which thresholds it is right (`boxes.hits`), which is found
when the batch is there, because it goes image by image; what is then left to do is quick enough for a bootstrap.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.boxes import BOXES
from ...data.table import Table
from ..base import Example
from ..judging import contrasted
from .boxes import average_precision, detections, hits
from .letterbox import Letterbox

_DETECTIONS = 100  # kept of an image, as COCO counts them
_SHOWN = 0.25  # the score from which a detection is shown
_BOX, _SCORE, _CLASS, _RIGHT = slice(0, 4), 4, 5, 6


def answers_of(boxes: Tensor, scores: Tensor, targets: Tensor, *, suppress: bool) -> Tensor:
    """(N, 100, 7) of boxes (N, A, 4), their scores (N, A, K) and true boxes (N, G, 5)."""
    found = detections(boxes.float(), scores.float(), _DETECTIONS, suppress=suppress)
    return torch.cat([found, hits(found, targets)[..., None].to(found.dtype)], dim=-1)


@dataclass(frozen=True)
class Classes:
    """The names of all classes; the first `own` are the detector's, the others are new."""

    names: Sequence[str]
    own: int

    def remarks(self, taught: Sequence[bool]) -> list[str]:
        """What is to be said of new classes, and of those without a box in the training rows."""
        remarks, new = [], self.names[self.own :]
        if new:
            remarks.append(
                f"New to the model: {', '.join(new)}. Before tuning it cannot name them, so the base has an mAP near 0 "
                "there; compare the old classes by map50 old."
            )
        if idle := [name for name, is_taught in zip(self.names, taught, strict=True) if not is_taught]:
            some = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            remarks.append(f"No training box of {some}: their scores get no gradient, and unmarked ones do no harm.")
        return remarks

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("map50", "map50_95", *(("map50 old", "map50 new") if len(self.names) > self.own else ()))

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        found = (answers[..., _SCORE], answers[..., _CLASS], answers[..., _RIGHT])
        ap = average_precision(*found, targets[..., 0], len(self.names))  # (T, K)
        scores = {"map50": ap[0], "map50_95": ap, "map50 old": ap[0, : self.own], "map50 new": ap[0, self.own :]}
        return {name: float(scores[name].nanmean()) for name in self.metrics}

    def all_right(self, answers: Tensor, targets: Tensor) -> Tensor:
        """(N,) bool: all things of the image are found, and nothing else is shown."""
        marked, shown = (targets[..., 0] >= 0).sum(1), answers[..., _SCORE] >= _SHOWN
        at_half = shown & (answers[..., _RIGHT].long() & 1).bool()
        return (at_half.sum(1) == marked) & (shown.sum(1) == marked)

    def contrasts(self, images: Sequence[str], targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Images in which one of two models finds all things and nothing else."""

        def words(i: int) -> tuple[str, str, str, str]:
            by_base, by_tuned = (self.found_in_words(answers[i]) for answers in (base, tuned))
            return images[i], self.in_words(targets[i, :, 0]), by_base, by_tuned

        right = [self.all_right(answers, targets) for answers in (base, tuned)]
        return contrasted(right[0], right[1], words)

    def found_in_words(self, answer: Tensor) -> str:
        """What is shown of one image: "2 cat, 1 dog"."""
        return self.in_words(answer[answer[:, _SCORE] >= _SHOWN, _CLASS])

    def in_words(self, classes: Tensor) -> str:
        """The classes of some boxes, counted; -1 is none."""
        counts = Counter(self.names[int(label)] for label in classes if label >= 0)
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"

    def shown(self, answer: Tensor, place: Letterbox) -> list[dict[str, Any]]:
        """The detections of one image as JSON, boxes in pixels of the image itself."""
        return [
            {
                "class": self.names[int(row[_CLASS])],
                "score": round(float(row[_SCORE]), 4),
                "box": [round(v, 1) for v in place.back(row[_BOX]).tolist()],
            }
            for row in answer[answer[:, _SCORE] >= _SHOWN]
        ]


def counts(table: Table) -> Counter[str]:
    """How many true boxes there are of each class."""
    return Counter(box.name for boxes in table.column(BOXES) for box in boxes)


def rarest(table: Table) -> list[str]:
    """The rarest class of each image; "" where it has no box."""
    found = counts(table)
    return [min((box.name for box in boxes), key=lambda name: found[name], default="") for boxes in table.column(BOXES)]
