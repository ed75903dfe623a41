"""Rows of tokens as one batch: padded at the end to the longest of them, with a mask that says what is there."""

from collections.abc import Mapping, Sequence

import torch

from ..base import Batch, Examples


def padded(examples: Examples, indices: Sequence[int], fillers: Mapping[str, int]) -> Batch:
    """The mask and each of the inputs (lists of whole numbers), (rows, longest).   fillers: of names that want no 0."""
    shape = (len(indices), max(examples.lengths[i] for i in indices))
    batch: Batch = {"attention_mask": torch.zeros(shape, dtype=torch.int64)}
    for name in examples.inputs[indices[0]]:
        batch[name] = torch.full(shape, fillers.get(name, 0))
    for row, i in enumerate(indices):
        for name, values in examples.inputs[i].items():
            batch[name][row, : len(values)] = torch.tensor(values)
        batch["attention_mask"][row, : examples.lengths[i]] = 1
    return batch
