"""Image classification: one of several classes, several at once, or a number, by a CNN or a vision transformer.

    x = (pixels / 255 - mean) / std      on the device, in the model
    outputs = W z + c                    z: (D,), what the model's own classifier was given;  W: (K, D)

The head starts from the linear probe on the frozen body, as for texts (Kumar et al. 2022, arXiv:2202.10054).

BatchNorms are run on the base's statistics, also while training.  Where the method keeps statistics of its own
(`batchnorm_tuning` with `statistics: adapted`), these follow the batches; they are saved with the adapter.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import nn

from ..core.checks import require_whole
from ..core.safe import write_tensors
from ..data.image_columns import image_column, label_column
from ..data.image_folder import FOLDER, read_images
from ..data.images import Fit, content_key, image_name, image_problems, in_threads
from ..data.labels import Kind, Labels, understand_labels
from ..data.table import Problem, Table
from .base import Asked, Batch, Examples, TaskModel
from .images.augment import disturbed, flip_is_safe, usual_place
from .images.batch_statistics import say_batch_statistics
from .images.image_input import Seen, with_said
from .images.image_models import ImageClassifier, load_image_model
from .images.pixels import ImageRows, Pixels
from .judging import seen_before
from .labelled import LabelledTask, labels_in
from .registry import task
from .row_roles import ROW_ROLES

Augment = Literal["crop", "shift", "off"]


@dataclass(frozen=True, kw_only=True)
class ImageClassificationSettings:
    """kind: of the labels; found where nobody says.   balance: let rare classes weigh more in the loss.

    image_size: side of the square that the model sees, in pixels.
    mean, std: per channel of pixels in 0..1; of one number each for models of grey images.   augment: of training
    images: "crop", "shift" or "off".   flip: exchange left and right too.  What nobody says is the model's, or chosen.
    """

    kind: Kind | None = None
    balance: bool = False
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | None = None
    flip: bool | None = None

    def __post_init__(self) -> None:
        require_whole(self, "image_size", least=8)


@task("image_classification")
class ImageClassification(LabelledTask):
    """Image classification with given columns, labels and way of seeing."""

    summary = "one of several classes, several at once, or a number, for images; CNNs and vision transformers"
    Settings = ImageClassificationSettings
    roles = ("image", "label", *ROW_ROLES)
    unit = "images"
    head_rate_factor = 0.15  # features of CNNs are many and positive: at 2e-3 a probe of clothes was unlearned
    # examples/image_classification, a seed on 3,000 images apart: 3 epochs .866, 5 .877, 8 .880.  At twice the rate it
    # falls below the probe for half of the run, and 5 evaluations ended it there (.854; without that end .884).
    epochs_factor, patience = 2.0, 8
    split_words = "by class, seeded, equal images kept together"

    def __init__(self, image: str, label: str | None, labels: Labels, settings: Any, metric: str | None = None) -> None:
        self.image_column, self.label_column, self.settings = image, label, settings
        self.set_labels(labels, metric)
        self.notes = list(labels.notes)
        self.augmented: Augment = "off"
        self.flips = False
        self.pixels = Pixels()

    seen: Seen | None = None  # known once the model is built, or from a saved result

    # -- rows -------------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        return read_images(where)

    @classmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        train, said, decide = tables["train"], asked.columns, asked.plan.decide
        image = decide("image column", said.get("image"), *image_column(train, said))
        label = decide("label column", said.get("label"), *label_column(train, image, said))
        values = train.column(label)
        kind = settings.kind
        if kind is None and label == FOLDER:  # the names of folders are classes, also where they are numbers
            kind = "binary" if len(set(values)) == 2 else "multiclass"
        labels = understand_labels(values, kind=kind)
        decide("kind", settings.kind, labels.kind, labels.reason)
        made = cls(image, label, labels, settings, asked.metric)
        made.take_rows(train, asked, settings.balance)
        return made

    def check(self, table: Table) -> dict[int, str]:
        problems, labels = image_problems(table.column(self.image_column)), self.check_rows(table)
        return labels | {i: f"{what}; {labels[i]}" if i in labels else what for i, what in problems.items()}

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        return self.beside.groups(table) or self._contents(table)

    def _contents(self, table: Table) -> list[Hashable]:
        return in_threads(content_key, table.column(self.image_column))

    def remarks(self, train: Table, test: Table) -> list[str]:
        return seen_before(self._contents(train), self._contents(test), "images")

    # -- the model --------------------------------------------------------------------------------------------------
    def build(self, asked: Asked) -> ImageClassifier:
        body, seen = load_image_model(asked)
        if self.seen is None:
            self.seen = with_said(seen, self.settings.image_size, self.settings.mean, self.settings.std)
        torch.manual_seed(asked.seed)  # of the new head
        return ImageClassifier(body, self.outputs, self.seen, asked.model.name)

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:
        decide, said, seen = asked.plan.decide, self.settings, self._seen
        decide("image_size", said.image_size, seen.fit.height, seen.why)
        classifier = cast(ImageClassifier, model)
        decide("features", None, str(classifier.head.in_features), classifier.where)
        self.augmented = decide("augment", said.augment, *usual_place(train.column(self.image_column), asked.seed))
        flips, why = flip_is_safe(self.labels.kind, self.labels.names)
        self.flips = decide("flip", said.flip, flips, why) and self.augmented != "off"
        say_batch_statistics(model.body, asked.plan)
        self.learn_from(train)

    @property
    def _seen(self) -> Seen:
        assert self.seen is not None, "build comes first"
        return self.seen

    # -- batches ----------------------------------------------------------------------------------------------------
    def encode(self, table: Table) -> Examples:
        inputs = self.pixels.rows(table.column(self.image_column), table.origins, self._seen.fit)
        return Examples(inputs, self.targets_of(table), [1] * len(table), 0, self.beside.weights(table))

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        assert isinstance(examples.inputs, ImageRows)
        return {"pixels": examples.inputs.batch(indices), **examples.targets_at(indices)}

    def augment(self, batch: Batch) -> Batch:
        if self.augmented == "off":
            return batch
        pixels = batch["pixels"].float() / 255
        return {**batch, "pixels": disturbed(pixels, self.augmented, flip=self.flips)}

    # -- using a result ---------------------------------------------------------------------------------------------
    def shown_input(self, table: Table, i: int) -> str:
        return image_name(table.column(self.image_column)[i])

    def resolved_settings(self) -> dict[str, Any]:
        side = self._seen.fit.height if self._seen.fit.height == self._seen.fit.width else None
        chosen = {"kind": self.labels.kind, "image_size": side, "augment": self.augmented, "flip": self.flips}
        return {**super().resolved_settings(), **chosen}

    def resolved_columns(self) -> dict[str, str]:
        return {"image": self.image_column, **({"label": self.label_column} if self.label_column else {})}

    def describe(self) -> dict[str, Any]:
        return {**self.describe_labels(), "columns": self.resolved_columns(), "seen": asdict(self._seen)}

    @classmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        columns, seen = description["columns"], description["seen"]
        image, labels = str(columns["image"]), labels_in(description)
        made = cls(image, columns.get("label"), labels, cls.Settings(), description["metric"])
        made.take_scale(description)
        numbers = {name: tuple(map(float, seen[name])) for name in ("mean", "std")}
        made.seen = Seen(fit=Fit(**seen["fit"]), **numbers, why="as it was trained")
        return made

    def table_of(self, inputs: Sequence[str]) -> Table:
        return Table({self.image_column: list(inputs)}, list(inputs))

    def rows_for(self, table: Table, *, labelled: bool) -> None:
        if self.image_column not in table.columns:
            self.image_column, _ = image_column(table, {})
        if not labelled:
            self.label_column = None
        elif self.label_column not in table.columns:
            self.label_column, _ = label_column(table, self.image_column, {})

    def save_body(self, body: nn.Module, folder: str) -> None:
        """A model of your own or of timm: its state dict, as `model.safetensors`."""
        if hasattr(body, "save_pretrained"):
            super().save_body(body, folder)
        else:
            tensors = {name: tensor.detach().clone() for name, tensor in body.state_dict().items()}
            write_tensors(Path(folder) / "model.safetensors", tensors)
