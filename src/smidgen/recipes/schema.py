"""Recipe: what a run is, declared.  Every mapping of the file is one class here, and every key one of its fields.

None means that nobody said, so the plan decides and says why.  `load.py` makes a Recipe from a file and from flags and
reports every mistake with its line; `Recipe.to_yaml` writes one that loads back equal.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..core.errors import ConfigError, RecipeError, TargetError
from ..core.method import Method, method_named
from ..core.targets import Targets
from ..data.labels import Kind
from .yaml import to_yaml

_PLAIN = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, str_min_length=1)
# what a single word stands for where a mapping could be: `model: models/minilm` is `model: {path: models/minilm}`
SHORT = {"model": "path", "data": "train", "task": "name", "method": "name"}

Count = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = _PLAIN


class ModelPart(_Part):
    """The pre-trained model.   path: a folder, a name on the hub, or package:NAME."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    revision: str | None = None  # of a model on the hub


class DataPart(_Part):
    """Where the rows are, and which columns count.   shift: name -> data from elsewhere, for the report only."""

    train: str
    valid: str | None = None
    test: str | None = None
    shift: dict[str, str] = {}
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"


class TaskPart(_Part):
    """What the model is tuned for.   max_length: of a text, in tokens."""

    name: str = "text_classification"
    kind: Kind | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


class MethodPart(_Part):
    """A method by name; every other key is a field of that method, checked against its own types."""

    model_config = ConfigDict(extra="allow")

    name: str = "lora"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's fields that were said, as plain data."""
        return dict(self.model_extra or {})

    def build(self) -> Method:
        """The method's own frozen dataclass.  Raises ConfigError; checked already in a recipe that was loaded."""
        method = method_named(self.name)
        return method(**_settings_of(method, self.settings))

    @model_validator(mode="after")
    def _is_a_method(self) -> Self:
        try:
            self.build()
        except (ConfigError, TargetError) as error:
            fields = [name for name in self.settings if str(error).startswith(name)]
            raise _mistake((*fields[:1],), str(error)) from error
        return self


class TrainPart(_Part):
    """How to train.   Rates are per step; evaluate_every and save_every count steps, patience evaluations.

    batch: rows in memory at once; accumulate: how many such batches make a step.   warmup: share of the steps.
    """

    epochs: Above0 | None = None
    steps: Count | None = None
    minutes: Above0 | None = None
    batch: Count | None = None
    accumulate: Count | None = None
    learning_rate: Above0 | None = None
    head_learning_rate: Above0 | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup: Share | None = None
    label_smoothing: Share | None = None
    clip: Above0 | None = None
    patience: Count | None = None
    evaluate_every: Count | None = None
    save_every: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    threads: Count | None = None


class ReportPart(_Part):
    """What the report compares with, and by which figure."""

    against: Annotated[tuple[Literal["full"], ...], Field(strict=False)] = ()
    metric: str | None = None


class Recipe(_Part):
    """A whole run.   dry_run: plan and check, train nothing."""

    recipe: Literal[1] = 1
    model: ModelPart
    data: DataPart
    task: TaskPart = TaskPart()
    method: SerializeAsAny[MethodPart] | None = None
    train: TrainPart = TrainPart()
    report: ReportPart = ReportPart()
    out: Annotated[Path, Field(strict=False)] | None = None
    dry_run: bool = False

    def method_object(self) -> Method:
        """The method with its settings; LoRA with its own defaults where the recipe names none."""
        return (self.method or MethodPart()).build()

    def to_yaml(self) -> str:
        """A recipe file that loads back equal to this; what nobody said is left out."""
        return to_yaml(self.model_dump(mode="json", exclude_none=True))
