"""Recipe: what a run is, declared.  Every mapping of the file is one class here, and every key one of its fields.

None means that nobody said, so the plan decides and says why.  `load.py` makes a Recipe from a file and from flags and
reports every mistake with its line; `Recipe.to_yaml` writes one that loads back equal.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..core.errors import nearest
from ..core.method import Method, method_named
from ..tasks.own.in_file import brings_model_and_data
from ..tasks.registry import task_said
from .method_part import MethodPart as MethodPart
from .method_part import TaskPart as TaskPart
from .part import Part, mistake, mistakes
from .yaml_text import write_yaml

# what a word or a number stands for where a mapping could be: `model: x` is `model: {path: x}`
SHORT = {"model": "path", "data": "train", "task": "name", "method": "name"}


Count = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelPart(Part):
    """The pre-trained model.   path: a folder, a name on the hub, package:NAME, or the file of a YOLO."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    quantize: Literal["nf4", "int8"] | None = None  # how linear layers of the body are held
    revision: str | None = None  # branch, tag or commit of a model on the hub

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> Self:
        if self.revision is not None and (self.path.startswith("package:") or Path(self.path).exists()):
            raise mistake(("revision",), f"{self.path} has no revisions: it is on this machine, not on the hub")
        return self


class DataPart(Part):
    """Where the rows are.   columns: role -> column.   shift: name -> data from elsewhere, for the report alone.

    in_memory: False leaves rows in their files.   cache: "off", or the folder where encoded rows are kept.
    """

    train: str
    valid: str | None = None
    test: str | None = None
    shift: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    on_bad_row: Literal["fail", "skip"] = "fail"
    in_memory: bool | None = None
    cache: str | None = None

    @model_validator(mode="after")
    def _nothing_is_used_twice(self) -> Self:
        said = {"train": self.train, "valid": self.valid, "test": self.test}
        sources = {(key,): value for key, value in said.items()} | {("shift", k): v for k, v in self.shift.items()}
        files = [(loc, Path(value)) for loc, value in sources.items() if value and Path(value).is_file()]
        twice = [
            (loc, f"{'.'.join(loc)} and {'.'.join(other)} are the same file: a figure measured on it would be too good")
            for index, (loc, file) in enumerate(files)
            for other, earlier in files[:index]
            if file.samefile(earlier)
        ] + [
            (("columns", key), f'{other} and {key} are the same column, "{name}"')
            for index, (key, name) in enumerate(self.columns.items())
            for other, earlier in list(self.columns.items())[:index]
            if name == earlier
        ]
        if twice:
            raise mistakes(twice)
        return self


class TrainPart(Part):
    """How to train.   evaluate_every and save_every count steps; patience counts evaluations without a better one.

    batch: rows in memory at once; accumulate: how many such batches make a step.   warmup: share of all steps.
    """

    epochs: Above0 | None = None
    steps: Count | None = None
    minutes: Above0 | None = None
    batch: Count | None = None
    accumulate: Count | None = None
    precision: Literal["fp32", "bf16"] | None = None  # of the computing; what is trained stays in fp32
    learning_rate: Above0 | None = None
    head_learning_rate: Above0 | None = None
    lora_plus: Annotated[float, Field(ge=1)] | None = None  # how many times faster than A a B learns
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup: Share | None = None
    label_smoothing: Share | None = None
    clip: Above0 | None = None  # of the gradients' norm
    optimizer: Literal["adamw", "adamw8bit"] | None = None
    recompute: Literal["off", "cheap", "all"] | None = None  # what blocks compute once more instead of keeping it
    compile: bool | None = None  # blocks, by torch.compile
    offload: Literal["off", "cpu"] | None = None  # where the kept inputs of blocks wait, with recompute: all
    patience: Count | None = None
    evaluate_every: Count | None = None
    save_every: Count | None = None
    products: Literal["usual", "onednn"] | None = None  # who multiplies with frozen weights in fp32 on a processor
    shard: bool | None = None  # spread the frozen base over the processes of the run
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    threads: Count | None = None
    top_layers: Count | None = None  # the method acts in so many of the last blocks alone
    replay: Literal["auto", "memory", "disk", "off"] | None = None  # rows of the frozen part, computed once

    @model_validator(mode="after")
    def _offloads_what_is_kept(self) -> Self:
        if self.offload == "cpu" and self.recompute != "all":
            raise mistake(("offload",), "cpu moves the kept inputs of blocks; say recompute: all with it")
        return self

    @model_validator(mode="after")
    def _compiles_what_runs_once(self) -> Self:
        if self.compile and self.recompute not in (None, "off"):
            what = f"blocks that recompute ({self.recompute}) are not compiled; leave one of the two out"
            raise mistake(("compile",), what)
        if self.compile and self.shard:
            raise mistake(("compile",), "blocks in shards are not compiled; leave compile or shard out")
        return self

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise mistake(("steps",), "epochs and steps are both given, and each says how long to train; keep one")
        return self


class ReportPart(Part):
    """What the report compares with, and by which figure.   against: "full" is fine-tuning all parameters."""

    against: Annotated[tuple[Literal["full"], ...], Field(strict=False)] = ()
    metric: str | None = None


class Recipe(Part):
    """A whole run.   dry_run: plan and check, train nothing."""

    recipe: Literal[1] = 1
    model: ModelPart
    data: DataPart
    task: TaskPart = TaskPart()
    method: MethodPart | None = None
    train: TrainPart = TrainPart()
    report: ReportPart = ReportPart()
    out: Annotated[Path, Field(strict=False)] | None = None
    dry_run: bool = False

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, values: Any) -> Any:
        return _with_its_own(spelled_out(values)) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        wrong: list[tuple[tuple[str, ...], str]] = []
        kind, tuned_for = self.task.settings.get("kind"), task_said(self.task.name)
        if self.train.label_smoothing and (kind in ("regression", "multilabel") or not tuned_for.smooths):
            what = f"{kind if tuned_for.smooths else self.task.name} has no single class to smooth; leave it out"
            wrong.append((("train", "label_smoothing"), what))
        for role in self.data.columns:
            if role not in tuned_for.roles:
                near = nearest(role, tuned_for.roles)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                known = f"Roles: {', '.join(tuned_for.roles)}" if tuned_for.roles else "It has no columns to name"
                wrong.append((("data", "columns", role), f'{self.task.name} has no role "{role}".{hint} {known}'))
        if self.method is not None and self.method.name == "head" and "targets" not in self.method.settings:
            what = (
                'a head alone, on the model as it is, is the row "base" of every report; it needs no own run. '
                'Choose a method that changes the model, such as "lora", or name modules of the model in '
                "method.targets, to train them whole"
            )
            if tuned_for.probed:
                wrong.append((("method", "name"), what))
        if self.train.shard and self.model.quantize:
            what = "the pieces of a quantised base are not spread over processes; leave out one of the two"
            wrong.append((("model", "quantize"), what))
        if self.train.shard and "full" in self.report.against:
            what = "a base in shards is not fine-tuned whole; leave out report.against or train.shard"
            wrong.append((("report", "against"), what))
        name = self.method_part.name
        if self.train.lora_plus is not None and not method_named(name).faster:
            wrong.append((("train", "lora_plus"), f"{name} has no B to learn faster; leave it out"))
        if self.model.quantize is not None and "full" in self.report.against:
            what = f"all parameters can be trained only where none are held as {self.model.quantize}; leave one out"
            wrong.append((("report", "against"), what))
        if self.out is not None and self.out.resolve() == Path(self.model.path).resolve():
            wrong.append((("out",), f"out is the model itself, {self.model.path}; choose another folder"))
        if self.out is not None and self.out.is_file():
            wrong.append((("out",), f"out is a file, {self.out}; it is to be a folder"))
        if wrong:
            raise mistakes(wrong)
        return self

    @property
    def method_part(self) -> MethodPart:
        """The method that the recipe names, else the task's."""
        return self.method or MethodPart(name=task_said(self.task.name).default_method[0])

    def method_object(self) -> Method:
        """The method with what is said of it; the rest are its own defaults."""
        return self.method_part.build()

    def to_yaml(self) -> str:
        """A recipe file that loads back equal to this one; what nobody said is left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        if self.method is not None:
            values["method"] = {"name": self.method.name, **self.method.settings}  # null may be a value there
        if self.task.settings or self.task != TaskPart():
            values["task"] = {"name": self.task.name, **self.task.settings}
        for empty in ("shift", "columns"):
            if not values["data"][empty]:
                del values["data"][empty]
        return write_yaml({key: value for key, value in values.items() if value not in ({}, {"against": []}, False)})


PARTS: dict[str, type[Part]] = {
    "model": ModelPart,
    "data": DataPart,
    "task": TaskPart,
    "train": TrainPart,
    "report": ReportPart,
}


def spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with mappings for what was said in a word; keys with nothing behind them were not said."""
    full: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, str | int | float) and key in SHORT:
            value = {SHORT[key]: value}
        if isinstance(value, dict) and key != "method":  # there, null may be a value
            value = {inner: said for inner, said in value.items() if said is not None}
        if value is not None:
            full[key] = value
    return full


def _with_its_own(full: dict[str, Any]) -> dict[str, Any]:
    """The recipe with model and data of the task's file, where that brings them and nothing else is said."""
    task, data = full.get("task"), full.get("data", {})
    name = task.get("name") if isinstance(task, Mapping) else None
    if not (isinstance(name, str) and brings_model_and_data(name) and isinstance(data, Mapping)):
        return full
    return {"model": {"path": name}, **full, "data": {"train": name, **data}}
