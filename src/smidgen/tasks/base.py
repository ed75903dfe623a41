"""Task: what a model is tuned for.  One file per task, found by its name; loop, probe and report know only this page.

    rows of a file -> table -> examples -> batch -> outputs -> loss          while training
                                                            -> answers       one row of numbers per example: judged

A run asks a task, in this order: `read` the files, `understand` them, `check` every row, `hold_out` what is not given,
`build` the model, `settle` what depends on both, `encode`.  Then the loop takes over: `collate`, `augment`, `loss`, and
`answer` and `score` to judge.  `describe` and `from_description` let a saved result be used again.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ..core.adapter import Held
from ..core.errors import DataError, RecipeError
from ..data.made_rows import MadeRows
from ..data.read import read_splits
from ..data.split import split
from ..data.table import Problem, Table
from .models import Located

T = TypeVar("T")
Batch = dict[str, Tensor]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Examples:
    """Rows made ready for the model.

    inputs: per row, what `collate` needs.   targets: (N, ...), what `score` compares answers with.
    lengths: per row what it costs (tokens; 1 where all cost the same), for batches of like rows.
    truncated: how many rows were cut to the maximal length.   weights: (N,), what each row counts in the loss.
    """

    inputs: Sequence[Mapping[str, Any]]
    targets: Tensor
    lengths: list[int]
    truncated: int = 0
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Sequence[int]) -> "Examples":
        """The rows at these indices, in this order."""
        some = list(indices)
        weights = None if self.weights is None else self.weights[some]
        inputs = self.inputs
        inputs = inputs.select(some) if isinstance(inputs, MadeRows) else [inputs[i] for i in some]
        return Examples(inputs, self.targets[some], [self.lengths[i] for i in some], 0, weights)

    def targets_at(self, indices: Sequence[int]) -> Batch:
        """The "targets" of the rows at these indices, and their "weights" where there are some, for a batch."""
        some = list(indices)
        return {"targets": self.targets[some]} | ({} if self.weights is None else {"weights": self.weights[some]})


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What rows ready for the model follow from, beside the tokenizer: values of columns, and settings.

    settings: as JSON has them; whatever `encode` looks at.   filler: for targets narrower than those of other rows.
    """

    columns: Sequence[str]
    settings: Mapping[str, Any]
    filler: int = 0


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test example on which tuned and base differ, and who is right."""

    text: str
    truth: str
    base: str
    tuned: str
    better: Literal["base", "tuned"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model that generates was asked, what the data answer, and what it said before and after."""

    prompt: str
    truth: str
    base: str
    tuned: str


class Decisions(Protocol):
    """The plan, as a task sees it: every setting that nobody said is entered with its reason."""

    def decide(self, name: str, said: T | None, chosen: T, why: str) -> T: ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the run was asked for, as far as a task has to know.

    columns: role -> name of a column, as far as said.   reserved: positions that the method takes for itself.
    dtype, revision: of the model's weights.   metric: what is to be compared by, if said.
    """

    model: Located
    plan: Decisions
    device: torch.device
    seed: int
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    dtype: str | None = None
    revision: str | None = None
    reserved: int = 0

    def decide_columns(self, chosen: Mapping[str, str], reasons: Mapping[str, str]) -> None:
        """Enter in the plan which column has which role, and why."""
        for role, why in reasons.items():
            self.plan.decide(f"{role} column", self.columns.get(role), chosen[role], why)


class TaskModel(nn.Module):
    """A pre-trained body and what the task puts on it.  forward(batch) -> outputs: a tensor, or several.

    body: where adapters go; the pre-trained model as its library loads it.
    head: what the task adds, trained with the adapter and saved beside it; `nn.Identity()` where there is none.

    The body stays in `eval()`: its dropout slows short runs and brings nothing there, its batch statistics are frozen,
    and adapters have their own dropout.
    """

    body: nn.Module
    head: nn.Module
    heads: tuple[str, ...] = ()  # modules of the body that are trained whole, as the method's own `heads` are

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.body.eval()
        for module in self.body.modules():
            # in eval() cuDNN refuses the backward pass of what is recurrent; without dropout the numbers are the same
            if isinstance(module, Held) or (isinstance(module, nn.RNNBase) and not module.dropout):
                module.train(mode)
        self.head.train(mode)
        return self

    def features(self, batch: Batch) -> Tensor:
        """What a linear head sees, (M, D) in fp32: one line per target.  Only where the task is `probed`."""
        raise NotImplementedError


class Task(ABC):
    """What a model is tuned for: how rows become batches, outputs a loss, and answers a figure.

    settings: the fields of `Settings` are the task's keys in a recipe.   roles: of columns that a recipe may name.
    """

    # -- what kind of task it is ------------------------------------------------------------------------------------
    name: ClassVar[str]
    summary: ClassVar[str]  # half a sentence, for lists
    Settings: ClassVar[type]  # a frozen dataclass with defaults for all fields
    roles: ClassVar[tuple[str, ...]]
    metrics_below: ClassVar[frozenset[str]] = frozenset()  # metrics that are better when lower
    peft_task_type: ClassVar[str] = "FEATURE_EXTRACTION"  # what HF PEFT is told of the body
    split_words: str = "by class, seeded, equal texts kept together"  # how `hold_out` holds out
    unit: ClassVar[str] = "tokens"  # what `Examples.lengths` counts
    probed: ClassVar[bool] = False  # the base is a linear probe on `TaskModel.features`; else the untouched model
    smooths: ClassVar[bool] = False  # knows `label_smoothing`
    may_shorten: ClassVar[bool] = True  # rows may be cut below `max_length` where the time is short
    largest_batch: ClassVar[int] = 32
    # where nobody names one, and why that
    default_method: ClassVar[tuple[str, str]] = ("lora", "the best known quality for its cost, and it merges")
    head_rate_factor: ClassVar[float] = 1.0  # on the preset's learning rate of the head
    epochs_factor: ClassVar[float] = 1.0  # on the preset's epochs
    patience: ClassVar[int] = 5  # evaluations without a better one
    resamples: ClassVar[int] = 1000  # of the bootstrap; fewer where a score is slow

    # -- what it is in this run -------------------------------------------------------------------------------------
    metrics: tuple[str, ...]  # all that fit; the first counts where nobody says
    metric: str  # what models are compared and chosen by
    notes: list[str]  # what the report is to say about the data
    max_length: int | None = None  # of a row; longer ones are cut.  None: rows have no length
    label_smoothing: float = 0.0

    @property
    def higher_is_better(self) -> bool:
        return self.metric not in self.metrics_below

    @property
    def kind_name(self) -> str:
        """What the metrics belong to, in a word."""
        return self.name

    def judge_by(self, metric: str | None) -> None:
        """Compare and choose models by this metric, else by the first of them.  Raises RecipeError."""
        if metric is not None and metric not in self.metrics:
            raise RecipeError(f'"{metric}" is no metric of {self.kind_name}; there are: {", ".join(self.metrics)}')
        self.metric = metric or self.metrics[0]

    # -- reading ----------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, where: str, settings: Any) -> tuple[dict[str, Table], list[Problem]]:
        """The tables at a place by part ("train", and "valid" and "test" where they are there), and unreadable rows."""
        parts, problems = read_splits(where)
        return {str(name): table for name, table in parts.items()}, problems

    @classmethod
    @abstractmethod
    def understand(cls, tables: Mapping[str, Table], settings: Any, asked: Asked) -> Self:
        """The task for these rows: which column is what, which labels there are.  Enters its choices in the plan.

        tables: "train", and as given "valid", "test", "shift:NAME".   Raises DataError, RecipeError or ModelError.
        """

    @abstractmethod
    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with rows: row number -> what."""

    def hold_out(self, table: Table, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the rows that stay and of those that judge, each ascending: seeded, by class, groups whole."""
        return split(len(table), labels=self.strata(table), groups=self.groups(table), fraction=fraction, seed=seed)

    def strata(self, table: Table) -> Sequence[Any] | None:
        """Per row the class whose share both sides of a split keep; None for none."""
        return None

    def groups(self, table: Table) -> Sequence[Hashable] | None:
        """Per row the group that is never split: equal texts, one user, one document; None for none."""
        return None

    # -- the model --------------------------------------------------------------------------------------------------
    @abstractmethod
    def build(self, asked: Asked) -> TaskModel:
        """The pre-trained model with a fresh head, on the CPU; the same each time.  Raises ModelError."""

    def settle(self, model: TaskModel, train: Table, asked: Asked) -> None:  # noqa: B027
        """Decide what depends on model and rows: maximal length, scale of the targets ..."""

    def method_settings(self, method: str, model: TaskModel) -> tuple[Mapping[str, Any], str]:
        """Settings of a method that this task wants in place of its preset's, as a recipe says them, and why."""
        return {}, ""

    def rate_factor(self, method: str) -> float:
        """On the learning rate of the method's preset."""
        return 1.0

    # -- rows -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, table: Table) -> Examples:
        """Rows ready for the model; rows without labels too, for predicting."""

    def encoding(self) -> Encoding | None:
        """What `encode` makes of a table, where each row follows from itself and its inputs are lists of whole numbers:
        many rows are then encoded a part at a time, held flat, and kept on disk for the next run.  None: all at once.
        """
        return None

    def complete(self, table: Table, examples: Examples) -> Examples:
        """Examples that were put together from parts, with what follows from all rows at once."""
        return examples

    @abstractmethod
    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """The rows at these indices as one padded batch of tensors with "targets" among them."""

    def augment(self, batch: Batch) -> Batch:
        """A training batch disturbed at random (torch's generator is seeded with the step), on the device."""
        return batch

    # -- learning ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The loss summed over what counts in the batch, and how many that are.

        Where the task is probed, it takes outputs (M, K) with {"targets": the lines of `feature_targets`} too.
        """

    def feature_targets(self, batch: Batch) -> Tensor:
        """The target of each line of `TaskModel.features`, (M, ...)."""
        return batch["targets"]

    def feature_weights(self, batch: Batch) -> Tensor | None:
        """What each line of `TaskModel.features` counts in the loss, (M,); None where all count the same."""
        return batch.get("weights")

    # -- judging ----------------------------------------------------------------------------------------------------
    def answer(self, outputs: Any, batch: Batch) -> Tensor:
        """What is kept of a batch to be judged: (rows, ...), of the same trailing shape in every batch."""
        if not isinstance(outputs, Tensor):
            raise NotImplementedError(f"{type(self).__name__} has outputs of several tensors, and says no answer")
        return outputs

    @abstractmethod
    def score(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """All metrics of these answers (N, ...) to these targets (N, ...)."""

    def parts(self, answers: Tensor, targets: Tensor) -> Tensor | None:
        """Per row the numbers (N, S) whose sums make the metric, if they do: intervals are then drawn a hundred times
        faster.  `value_of` makes the metric of sums.
        """
        return None

    def value_of(self, sums: Tensor) -> Tensor:
        """(..., S) -> (...): the metric of summed `parts`; unless told otherwise, the first over the second."""
        return sums[..., 0] / sums[..., 1]

    def constant(self, targets: Tensor, count: int) -> tuple[str, Tensor] | None:
        """The answers of someone who knows only the training targets, `count` times, and what to call that; or None."""
        return None

    def confusion(self, answers: Tensor, targets: Tensor) -> tuple[Sequence[str], list[list[int]]] | None:
        """The names of the classes and the counts (rows = truth), if the task has few classes."""
        return None

    def contrasts(self, table: Table, targets: Tensor, base: Tensor, tuned: Tensor) -> list[Example]:
        """Rows on which exactly one of two answers is right."""
        return []

    def samples(self, model: TaskModel, table: Table, rows: Sequence[int]) -> list[str]:
        """What the model generates for these rows, where it generates; else nothing."""
        return []

    def prompt_of(self, table: Table, row: int) -> str:
        """What a row asks, in words; where `samples` says something."""
        raise NotImplementedError

    def truth_of(self, table: Table, row: int) -> str:
        """What the data answer in a row, in words; where `samples` says something."""
        raise NotImplementedError

    def remarks(self, train: Table, test: Table) -> list[str]:
        """What the split leaves to be said: test rows that stand in training too ..."""
        return []

    def resolved_settings(self) -> dict[str, Any]:
        """The task's settings as this run came to choose them, for the recipe that runs the same again."""
        known = {field.name for field in fields(self.Settings)}
        return {"max_length": self.max_length} if "max_length" in known else {}

    def resolved_columns(self) -> dict[str, str]:
        """Role -> column, as this run came to choose them."""
        return {}

    # -- using a result ---------------------------------------------------------------------------------------------
    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed to use the tuned model again, as JSON, with "task": name; read by `from_description`."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: Mapping[str, Any], asked: Asked) -> Self:
        """The task of a saved result.  Raises KeyError, TypeError, ValueError or RecipeError for what is not known."""

    def table_of(self, inputs: Sequence[str]) -> Table:
        """A table of inputs given on the command line.  Raises DataError where the task needs a file."""
        raise DataError(f"{self.name} takes its rows from a file: give --data FILE")

    def rows_for(self, table: Table, *, labelled: bool) -> None:  # noqa: B027
        """Get ready for another file, whose columns may have other names.   labelled: it is to be judged."""

    @abstractmethod
    def predicted(self, table: Table, answers: Tensor) -> list[dict[str, Any]]:
        """Per row what is shown of its answer, as JSON: the input, the prediction, how sure."""

    def save_body(self, body: nn.Module, folder: str) -> None:
        """Write a merged body as its library reads it again, with the task's tokenizer where it has one."""
        saver: Any = getattr(body, "save_pretrained", None)
        if saver is None:
            raise RecipeError(f"{type(body).__name__} has no folder format of its own: merge it in Python")
        saver(folder)
        tokenizer: Any = getattr(self, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
