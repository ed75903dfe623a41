"""Detectors: what object detection needs of a model, for YOLO heads of ultralytics and DETR-likes of transformers.

    outputs = {"loss": (), "boxes": (N, A, 4), "scores": (N, A, K)}      boxes as x1, y1, x2, y2 in pixels

The loss is the model's own.  A model of ultralytics' kind is known by what it has; yolo.py loads those in files.
BatchNorm and dropout of the body rest while training (`TaskModel`), so one forward gives both the loss and the boxes;
BatchNorms with statistics of an adapter's own do not (images/batch_statistics.py).

New classes grow behind the old ones, which keep their weights and names on disk:

    s(x) = [s_old(x), V x + c]      V: (new classes, D), c: trained whole, the head of the task; s_old: as it was

No box of some old class in the training rows does not mean that there is none in the images, only that nobody marked
them.  The loss has no part in the scores of such classes: they are not taught that nothing is there.  But what they are
computed from moves; a YOLO can be held to what it gave before (images/remembered.py).
"""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import MissingDependency, ModelError, RecipeError
from ..base import Asked, Batch, TaskModel
from ..loading import first_line, load_body
from .batch_statistics import train_adapted_norms
from .remembered import forgetting
from .yolo import load

_YOLO = "a .loss(batch, predictions) and a Detect head as .model[-1], with nc, stride, reg_max and cv3"
_LAYER = 8  # more parameters than that has a layer of a transformer, and none of a stack of plain layers
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as all DETR-likes were trained with


class Detector(TaskModel):
    """A body that finds boxes.   names: of the classes, in the order of the scores; the first `own` are the body's.

    batch: "image" (N, 3, S, S) from 0 to 1, "targets" (N, G, 5) class and box in pixels, padded with -1.
    suppress: True if boxes of one thing have to be thinned out.   multiple: what S has to be a multiple of.
    can_remember: there is a way to hold old classes to what they were.
    """

    suppress: bool = False
    multiple: int = 1
    can_remember: ClassVar[bool] = False
    remembers: bool = False
    head: nn.ModuleList
    taught: Tensor

    def __init__(self, body: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.body, self.names, self.own = body.eval(), list(names), len(names)
        self.head = nn.ModuleList()  # the layers of the new classes
        self.appended: list[Appended] = []
        self.register_buffer("taught", torch.ones(len(names), dtype=torch.bool), persistent=False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        train_adapted_norms(self.body, mode)
        return self

    def refuse_side(self, side: int, name: str) -> None:
        """Raise RecipeError for a side S that the body cannot take.   name: of the model, for errors."""
        if side % self.multiple:
            near = max(1, round(side / self.multiple)) * self.multiple
            raise RecipeError(
                f"task.image_size is {side}; for {name} it is a multiple of {self.multiple}, such as {near}"
            )

    def refuse_other(self, names: Sequence[str], name: str) -> None:
        """Raise ModelError if a tuned model that grew on classes of these names did not grow on this body's."""
        if self.names != names:
            raise ModelError(
                f"{name} has the classes {', '.join(self.names[:5])} ...; the tuned model grew on one "
                f"with {', '.join(names[:5])} ..."
            )

    def grow(self, names: Sequence[str]) -> None:
        """Add classes, with scores from torch's generator.  Once, before anything is attached."""
        if names:
            self.names += names
            self.taught = torch.ones(len(self.names), dtype=torch.bool)
            self.extend(len(names))

    def teach(self, taught: Sequence[bool], *, remember: bool = False) -> None:
        """Which classes, old and new, the loss is about.   remember: hold the other old ones to what they were."""
        self.taught, self.remembers = torch.tensor(taught), remember
        # else an adapter of the old classes' own layer has nothing to learn, and no place
        learns = any(taught[: self.own]) or remember
        for appended in self.appended:
            appended.frozen = not (learns or appended.behind)

    @abstractmethod
    def last_stage(self) -> list[str]:
        """Patterns of the body's modules behind its backbone: the neck, where it has one, and the head."""

    @abstractmethod
    def extend(self, count: int) -> None:
        """Add `count` classes behind the old ones."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of the batch times its images, and every box with its scores."""


class YoloDetector(Detector):
    """A DetectionModel of ultralytics 8.4 (YOLOv8 to YOLO26), or what looks like one."""

    can_remember = True

    def __init__(self, body: nn.Module) -> None:
        detect: Any = cast(Any, body).model[-1]
        names = getattr(body, "names", None) or range(detect.nc)
        super().__init__(body, [str(name) for name in (names.values() if isinstance(names, dict) else names)])
        self.multiple, self.is_unique = int(max(detect.stride)), bool(getattr(detect, "end2end", False))
        self.suppress = not self.is_unique

    def last_stage(self) -> list[str]:
        """From the first layer that puts others together (its `f` lists them), and the branches of the head.

        What else the head has is no weight to be learned: the distances that its distributions are over.
        """
        *layers, detect = cast(Any, self.body).model
        joins = [i for i, layer in enumerate(layers) if isinstance(getattr(layer, "f", None), list)]
        neck = [f"model.{i}.*" for i in range(min(joins, default=len(layers)), len(layers))]
        branches = [name for name, child in detect.named_children() if isinstance(child, nn.ModuleList)]
        return [*(p for p in neck if self._has_parameters(p)), *(f"model.{len(layers)}.{name}.*" for name in branches)]

    def _has_parameters(self, pattern: str) -> bool:
        return any(True for _ in self.body.get_submodule(pattern.removesuffix(".*")).parameters())

    def extend(self, count: int) -> None:
        body, detect = cast(Any, self.body), cast(Any, self.body).model[-1]
        detect.nc, detect.no = detect.nc + count, detect.no + count
        body.nc, body.criterion = detect.nc, None  # the criterion counts classes too
        body.names = dict(enumerate(self.names))
        for branches in filter(None, (detect.cv3, getattr(detect, "one2one_cv3", None))):
            for branch, stride in zip(branches, detect.stride.tolist(), strict=True):
                old = branch[-1]
                new = nn.Conv2d(old.in_channels, count, 1, device=old.weight.device)
                # as YOLO starts: about 5 things in an image of 640 pixels, each class as likely
                nn.init.constant_(cast(Tensor, new.bias), math.log(5 / detect.nc / (640 / stride) ** 2))
                self.appended.append(Appended(new, old, branch, dim=1))
                self.head.append(new)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, targets = batch["image"], batch["targets"]
        decoded, raw = self.body(images)  # it is in eval mode
        there = targets[..., 0] >= 0
        marked = targets[there]  # (M, 5)
        side = images.shape[-1]
        centred = torch.cat([marked[:, 1:3] + marked[:, 3:5], 2 * (marked[:, 3:5] - marked[:, 1:3])], 1) / (2 * side)
        said = {"img": images, "batch_idx": there.nonzero()[:, 0].float(), "cls": marked[:, :1], "bboxes": centred}
        losses, _ = cast(Any, self.body).loss(said, (decoded, self._taught_alone(raw)))
        loss = losses.sum()
        if self.remembers:
            to_remember = ~self.taught & (torch.arange(len(self.taught)) < self.own)
            forgotten = forgetting(self.body, images, raw, to_remember.to(images.device))
            loss = loss if forgotten is None else loss + len(images) * forgotten
        boxes, scores = self._boxes(decoded.detach())
        return {"loss": loss, "boxes": boxes, "scores": scores}

    def _taught_alone(self, raw: Any) -> Any:
        """The predictions, those of the classes that are not taught without a way back."""
        if not isinstance(raw, dict):
            raise ModelError(f"the Detect head gives {type(raw).__name__}; ultralytics 8.4 and later give a dict")
        if "scores" not in raw:
            return {name: self._taught_alone(branch) for name, branch in raw.items()}
        scores = raw["scores"]  # (N, K, A)
        return {**raw, "scores": torch.where(self.taught.to(scores.device)[:, None], scores, scores.detach())}

    def _boxes(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        detect = cast(Any, self.body).model[-1]
        if self.is_unique:  # (N, A, 6): box, score, class
            one = F.one_hot(decoded[..., 5].long(), len(self.names)) * decoded[..., 4, None]
            return decoded[..., :4], one
        boxes, scores = decoded[:, :4].mT, decoded[:, 4:].mT
        return (boxes if getattr(detect, "xyxy", False) else _corners(boxes)), scores


class DetrDetector(Detector):
    """YOLOS, DETR or Table Transformer: queries whose classes compete with "no object", one query for one thing."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module) -> None:
        self.config: Any = copy.deepcopy(cast(Any, body).config)
        names = [str(self.config.id2label[i]) for i in range(self.config.num_labels)]
        super().__init__(body, names)
        self.config.auxiliary_loss = False  # of decoder layers in between: a few adapters need no such help
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def last_stage(self) -> list[str]:
        """The decoder's layers, or the last third of the only stack, and the networks for classes and boxes."""
        heads = [name for name in ("class_labels_classifier", "bbox_predictor") if hasattr(self.body, name)]
        stacks = [
            (name, len(stack))
            for name, stack in self.body.named_modules()
            if isinstance(stack, nn.ModuleList) and len({type(layer) for layer in stack}) == 1
            if name.partition(".")[0] not in heads and len(list(stack[0].parameters())) > _LAYER
        ]
        name, count = stacks[-1]
        first = 0 if len(stacks) > 1 else count - math.ceil(count / 3)
        return [*(f"{name}.{i}.*" for i in range(first, count)), *heads, *(f"{head}.*" for head in heads)]

    def extend(self, count: int) -> None:
        classifier = cast(Any, self.body).class_labels_classifier
        old = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
        new = nn.Linear(old.in_features, count, device=old.weight.device)
        nn.init.constant_(new.bias, float(old.bias.detach()[:-1].mean()))  # as likely as an old class
        self.appended.append(Appended(new, old, old, dim=2, behind=1))
        self.head.append(new)
        self.config.num_labels = len(self.names)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, targets = batch["image"], batch["targets"]
        out = self.body(pixel_values=(images - self.mean) / self.std)
        logits, centred = out.logits.float(), out.pred_boxes.float()  # (N, Q, K + 1), (N, Q, 4)
        taught = F.pad(self.taught, (0, 1), value=True).to(logits.device)
        labels = [_label(rows[rows[:, 0] >= 0], images.shape[-1]) for rows in targets]
        try:
            loss, *_ = cast(Any, self.body).loss_function(
                torch.where(taught, logits, logits.detach()), labels, logits.device, centred, self.config, None, None
            )
        except ImportError as error:
            raise MissingDependency(f'the loss of DETR needs more: {first_line(error)}; pip install "scipy"') from error
        boxes = _corners(centred.detach()) * images.shape[-1]
        return {"loss": loss * len(images), "boxes": boxes, "scores": logits.detach().softmax(-1)[..., :-1]}


class Appended:
    """Behind the channels of a layer, those that `new` makes of the same input.

    where: the module at whose end they are put; the layer itself, or a sequence that ends with it.
    behind: how many of the old channels stay last, along `dim`.   frozen: the old ones get no gradient.
    """

    def __init__(self, new: nn.Module, layer: nn.Module, where: nn.Module, dim: int, behind: int = 0) -> None:
        self.new, self.dim, self.behind, self.frozen, self.seen = new, dim, behind, False, torch.zeros(0)
        layer.register_forward_pre_hook(self.look)
        where.register_forward_hook(self.append)

    def look(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0]

    def append(self, where: nn.Module, args: Any, output: Tensor) -> Tensor:
        old = output.shape[self.dim] - self.behind
        output = output.detach() if self.frozen else output
        before, after = output.narrow(self.dim, 0, old), output.narrow(self.dim, old, self.behind)
        seen, self.seen = self.seen, torch.zeros(0)
        return torch.cat([before, self.new(seen).to(output.dtype), after], self.dim)


def load_detector(asked: Asked) -> Detector:
    """The detector asked for, as it was trained.  Raises ModelError for a model that is none."""
    if asked.model.is_made:
        return detector_of(asked.model.made(), asked.model.name)
    if asked.model.is_yolo:
        said = {"dtype": asked.dtype not in (None, "float32"), "quantize": asked.model.quantize is not None}
        if wrong := [f"model.{key}" for key, is_said in said.items() if is_said]:
            raise ModelError(f"{asked.model.name} is a YOLO, which is held in float32; leave out {' and '.join(wrong)}")
        return detector_of(load(asked.model.source), asked.model.name)
    body = load_body(asked.model, asked.dtype, asked.revision, kind="AutoModelForObjectDetection", whole=True)
    return detector_of(body, asked.model.name)


def detector_of(body: nn.Module, name: str) -> Detector:
    """The detector around a body.  Raises ModelError saying what is missing.   name: what to call it there."""
    if hasattr(body, "class_labels_classifier") and hasattr(getattr(body, "config", None), "eos_coefficient"):
        return DetrDetector(body)
    if hasattr(body, "config"):
        raise ModelError(
            f'{name} is a {type(body).__name__}, whose classes do not compete with "no object"; of transformers, '
            "YOLOS, DETR and Table Transformer can be tuned"
        )
    layers = getattr(body, "model", None)
    detect = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    if detect is None or not all(hasattr(detect, part) for part in ("nc", "stride", "reg_max", "cv3")):
        raise ModelError(f"{name} is a {type(body).__name__}, and no detector that is known: it is to have {_YOLO}")
    if not hasattr(body, "loss"):
        raise ModelError(f"{name} has no loss: a detector is to have {_YOLO}")
    return YoloDetector(body)


def _corners(boxes: Tensor) -> Tensor:
    """cx, cy, width, height -> x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _label(rows: Tensor, side: int) -> dict[str, Tensor]:
    """True boxes (M, 5) as transformers wants them."""
    corners = rows[:, 1:] / side
    centred = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    return {"class_labels": rows[:, 0].long(), "boxes": centred}
