"""The example folders that every later release must read: one per format version, under `golden/`.

A new format version gets a new folder:  python -m tests.formats.golden tests/formats/golden/format-2
All numbers are small fractions of powers of two, so that they are the same on every machine.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from smidgen import LoRA, Stack, Targets, attach
from smidgen.adapters import AdapterSet
from smidgen.methods.bitfit import BitFit
from smidgen.methods.ia3 import IA3


class Example(nn.Module):
    """Words to three numbers, with a head of two; input (B, T) of word numbers below 6."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)
        self.classifier = nn.Linear(3, 2)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = pattern(parameter.shape, number)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.first(self.words(ids).mean(1))
        return self.classifier(self.second(h))


def pattern(shape: torch.Size, seed: int) -> Tensor:
    """Numbers between -1 and 1 in steps of 1/16."""
    return ((torch.arange(shape.numel()) * 7 + seed * 5) % 33 - 16).float().div(16).reshape(shape)


IDS = torch.tensor([[0, 1, 2, 3], [5, 4, 1, 1]])


def example() -> AdapterSet:
    """Three adapters on the example model, two of them active."""
    adapters = attach(
        Example(),
        LoRA(rank=2, alpha=4, targets=["words", "first"], rank_pattern={"first": 3}, heads=("classifier",)),
        "style",
    )
    adapters.add(IA3(targets=["first", "second"], feedforward=("second",)), "scale")
    adapters.add(BitFit(targets=Targets("second").parameter("bias")), "shift")
    for number, parameter in enumerate(adapters.parameters(*adapters.names)):
        parameter.data = pattern(parameter.shape, number)
    adapters.activate(Stack("style", "scale"))
    return adapters


def write(folder: str | Path) -> None:
    """Write the example as this release writes it."""
    example().save(folder, base_model="example", task_type="SEQ_CLS", extra={"labels": ["no", "yes"]})


if __name__ == "__main__":
    write(sys.argv[1])
