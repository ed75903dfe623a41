"""Object detection: boxes with classes, judged by COCO's mean average precision.

The body is the detector as it was trained; classes that the data names and the detector does not know grow behind its
own (images/detectors.py), and are the head.  The base of the comparison is the untouched model, new classes at random.
Images are letterboxed into a square of `image_size`.

Frames of one video are alike: with `data.columns.group` they stay on one side of a split (columns: data/boxes.py).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..core.checks import require_whole
from ..core.errors import DataError, RecipeError, require
from ..data.boxes import BOXES, IMAGE, read_boxes
from ..data.images import content_key, image_problems, image_size, in_threads
from ..data.table import Problem, Table
from .base import Asked, Batch, Example, Examples, TaskModel
from .images.batch_statistics import say_batch_statistics
from .images.detectors import Detector, load_detector
from .images.disturbed import disturbed
from .images.found import Classes, answers_of, counts, rarest
from .images.letterbox import Letterbox, Square, boxes_in_squares
from .images.pixels import ImageRows, Pixels
from .registry import task
from .row_roles import RowRoles, TaskWithRoles

_ON_CPU, _ELSEWHERE = 320, 640


@dataclass(frozen=True, kw_only=True)
class ObjectDetectionSettings:
    """image_size: side of the square that images are fitted into, in pixels.

    augment: flip, scale, shift and recolour training images; say false where mirrored things are other things.
    remember: hold the old classes that no training image marks to what the untouched detector says, which runs beside.
    """

    image_size: int | None = None
    augment: bool = True
    remember: bool | None = None

    def __post_init__(self) -> None:
        require_whole(self, "image_size", least=32)
        for name, value in {"augment": self.augment, "remember": self.remember or False}.items():
            require(isinstance(value, bool), f"{name} is {value}; it is true or false")


@task("object_detection")
class ObjectDetection(TaskWithRoles):
    """Object detection with given classes and image size.

    names: of all classes; the first `own` are the detector's, the others are new.   answers: images/found.py.
    """

    summary = "boxes with classes in images, for YOLO and DETR-like detectors; new classes grow"
    Settings = ObjectDetectionSettings
    roles = ("group",)
    unit = "images"
    largest_batch = 16
    resamples = 200
    split_words = "by class, seeded, equal images kept together"
    # examples/detection, 60 steps: mAP50 .84; LoRA at 5e-4 .69, at 2e-3 .77, the old classes .76 -> .67 and .17
    default_method = ("selective", "the detector's own weights, the most important: mAP50 .84 where lora came to .77")

    def __init__(
        self,
        names: Sequence[str],
        own: int,
        image_size: int,
        *,
        augment: bool = True,
        remember: bool = False,
        metric: str | None = None,
    ) -> None:
        self.classes, self.image_size = Classes(list(names), own), image_size
        self.augments, self.remembers = augment, remember
        self.names, self.own = self.classes.names, own
        self.taught, self.suppress = [True] * len(self.names), True
        self.metrics = self.classes.metrics
        self.judge_by(metric)
        self.notes = []
        self.pixels = Pixels()

    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        return read_boxes(where)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        beside = RowRoles.said(tables["train"], asked, cls.roles)
        detector = load_detector(asked)
        marked = counts(tables["train"])
        if not marked:
            raise DataError("no training image has a box")
        new = sorted(set(marked) - set(detector.names))
        names = [*detector.names, *new]
        side, why = (_ON_CPU, "half the usual") if asked.device.type == "cpu" else (_ELSEWHERE, "usual")
        side = asked.plan.decide("image_size", settings.image_size, side, f"{why} on a {asked.device.type.upper()}")
        detector.refuse_side(side, asked.model.name)
        asked.plan.decide("classes", None, f"{detector.own} old, {len(new)} new", ", ".join(new) or "all are known")
        if outlines := sum(box.is_outline for t in tables.values() for boxes in t.column(BOXES) for box in boxes):
            asked.plan.decide("polygons", None, f"{outlines:,} read as boxes", "the smallest that hold them")
        why_not = "" if detector.can_remember else "no way known for this detector"
        if set(detector.names) <= set(marked):
            why_not = "all old classes are marked"
        require(not (settings.remember and why_not), f"task.remember is true: {why_not}; leave it out", RecipeError)
        why = why_not or "unmarked old classes stay near what they were"
        remember = asked.plan.decide("remember", settings.remember, not why_not, why)
        made = cls(names, detector.own, side, augment=settings.augment, remember=remember, metric=asked.metric)
        made.taught = [name in marked for name in names]
        made.notes += made.classes.remarks(made.taught)
        made.take_roles(beside, by_class=True)
        return made

    def check(self, table: Table) -> dict[int, str]:
        problems = self.beside.check(table) | image_problems(table.column(IMAGE))
        for i, boxes in enumerate(table.column(BOXES)):
            if unknown := sorted({box.name for box in boxes} - set(self.names)):
                problems[i] = f"{', '.join(unknown)}: no class of the model, and in no training image"
        return problems

    def strata(self, table: Table) -> Sequence[Any] | None:
        return rarest(table)

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """What the column "group" says, such as frames of one video; else equal images."""
        return self.beside.groups(table) or in_threads(content_key, table.column(IMAGE))

    def build(self, asked: Asked) -> TaskModel:
        detector = load_detector(asked)
        detector.refuse_other(self.names[: self.own], asked.model.name)
        torch.manual_seed(asked.seed)  # of the new classes
        detector.grow(self.names[self.own :])
        detector.teach(self.taught, remember=self.remembers)
        self.suppress = detector.suppress
        return detector

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        say_batch_statistics(model.body, asked.plan)

    def method_settings(self, method: str, model: TaskModel) -> tuple[Mapping[str, Any], str]:
        if method != "selective":
            return {}, ""
        assert isinstance(model, Detector)
        settings = {"by": "fisher", "grain": "tensors", "budget": 0.05, "targets": model.last_stage()}
        return settings, "a twentieth of the weights, in neck and head"

    def rate_factor(self, method: str) -> float:
        return 0.5 if method == "selective" else 0.25

    def encode(self, table: Table) -> Examples:
        inputs = self.pixels.rows(table.column(IMAGE), table.origins, Square(self.image_size))
        return Examples(inputs, boxes_in_squares(table, self.image_size, self.names), [1] * len(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        assert isinstance(examples.inputs, ImageRows)
        return {IMAGE: examples.inputs.batch(indices).float() / 255, **examples.targets_at(indices)}

    def augment(self, batch: Batch) -> Batch:
        if not self.augments:
            return batch
        images, targets = disturbed(batch[IMAGE], batch["targets"])
        return {IMAGE: images, "targets": targets}

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The detector's own, a mean over what it matched in the batch; times images, to be counted by images."""
        return outputs["loss"], len(batch["targets"])

    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        return answers_of(outputs["boxes"], outputs["scores"], batch["targets"], suppress=self.suppress)

    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        return self.classes.score(answers, targets)

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        return self.classes.contrasts(table.column(IMAGE), targets, base, tuned)

    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        return [
            {"image": image, "boxes": self.classes.shown(rows, Letterbox.of(image_size(image), self.image_size))}
            for image, rows in zip(table.column(IMAGE), answers, strict=True)
        ]

    def resolved_settings(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "augment": self.augments, "remember": self.remembers}

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "names": self.names,
            "own": self.own,
            "image_size": self.image_size,
            "metric": self.metric,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        names, own, side = description["names"], int(description["own"]), int(description["image_size"])
        if not isinstance(names, list) or not 0 <= own <= len(names) or side < 1:
            raise ValueError(f"names, own and image_size are {names!r}, {own}, {side}")
        return cls(list(map(str, names)), own, side, augment=False, metric=description["metric"])

    def table_of(self, inputs: Sequence[str]) -> Table:
        return Table({IMAGE: list(inputs), BOXES: [[] for _ in inputs]}, list(inputs))
