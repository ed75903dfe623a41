"""Rows of tokens as one batch: padded at the end to the longest of them, with a mask that says what is there."""

from collections.abc import Mapping, Sequence

import torch

from ..base import Batch, Examples


def padded_ids(rows: Sequence[Sequence[int]], filler: int) -> Batch:
    """ "input_ids" and "attention_mask" of rows of tokens, (rows, longest) each."""
    examples = Examples([{"input_ids": row} for row in rows], torch.empty(0), [len(row) for row in rows])
    return padded(examples, range(len(rows)), {"input_ids": filler})


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
