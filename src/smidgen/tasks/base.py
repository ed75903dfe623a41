"""Task: what a model is tuned for.  One file per task; loop, probe and report know only what stands here."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..data.table import Table

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Rows made ready for the model: encoded inputs, targets, and how long each is (in tokens), for bucketing."""

    inputs: Sequence[Mapping[str, list[int]]]
    targets: Tensor
    lengths: list[int]
    truncated: int  # how many rows were cut to the maximal length

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, indices: Sequence[int]) -> "Examples":
        """The rows at these indices, in this order."""
        some = list(indices)
        return Examples([self.inputs[i] for i in some], self.targets[some], [self.lengths[i] for i in some], 0)


class Task(ABC):
    """What a model is tuned for: how rows become batches, outputs a loss, and predictions a figure."""

    name: ClassVar[str]
    metric: str  # what models are compared and chosen by
    higher_is_better: bool = True
    max_length: int

    @abstractmethod
    def check(self, table: Table) -> dict[int, str]:
        """What is wrong with rows: row number -> what."""

    @abstractmethod
    def encode(self, table: Table) -> Examples:
        """Rows ready for the model."""

    @abstractmethod
    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """The rows at these indices as one padded batch."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """The loss summed over what counts in the batch, and how many that are."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """All metrics of these outputs, the one that counts among them."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed to use the tuned model again: saved beside the adapter, read by `Task.from_description`."""


class TaskModel(nn.Module):
    """A pre-trained body and what the task puts on it.  forward(batch) -> outputs in fp32.

    body: where adapters go; the pre-trained model as its library loads it.
    head: what the task adds, trained with the adapter and saved beside it.
    """

    body: nn.Module
    head: nn.Module
