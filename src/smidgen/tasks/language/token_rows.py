"""Rows of tokens, and documents packed into blocks of one size so that little is padded and few are cut.

Longest first, each into the block where it leaves the least room (best-fit decreasing).  Nothing is cut but documents
that are longer than a block.   Ding et al. 2024, arXiv:2404.10830.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..base import Batch, Examples
from ..text.padding import padded

IGNORED = -100  # the target of a token that is not learned
Tokens = tuple[list[int], list[int]]  # ids; targets: the id itself where it is to be learned, else IGNORED


def as_examples(
    rows: Sequence[Tokens], size: int, weights: Tensor | None = None, *, packed: bool, keep_all: bool
) -> Examples:
    """Rows cut to `size` tokens, each alone or in blocks of that size; without those that have nothing to learn.

    weights: (N,), what each row counts; of rows in blocks None.
    """
    cut = sum(len(ids) > size for ids, _ in rows)
    kept = [i for i, (_, targets) in enumerate(rows) if keep_all or learns(targets[:size])]
    rows, weights = [(rows[i][0][:size], rows[i][1][:size]) for i in kept], None if weights is None else weights[kept]
    inputs = blocks(rows, size) if packed else [{"input_ids": ids, "targets": targets} for ids, targets in rows]
    counts = [sum(target != IGNORED for target in row["targets"]) for row in inputs]
    return Examples(inputs, torch.tensor(counts), [len(row["input_ids"]) for row in inputs], cut, weights)


def as_batch(examples: Examples, indices: Sequence[int], filler: int) -> Batch:
    """The rows at these indices, padded; without a mask where positions say which document a token is of."""
    batch = padded(examples, indices, {"input_ids": filler, "targets": IGNORED})
    if "position_ids" in batch:
        del batch["attention_mask"]  # padding stands at position 0 each: documents of one token
    if examples.weights is not None:
        batch["weights"] = examples.weights[list(indices)]
    return batch


def learns(targets: Sequence[int]) -> bool:
    """True if a token is to be learned."""
    return any(target != IGNORED for target in targets)


def pieces(row: Tokens, size: int) -> Iterator[Tokens]:
    """A document in pieces of at most `size` tokens; the first token of each follows nothing, so it is not learned."""
    ids, targets = row
    for start in range(0, len(ids), size):
        yield ids[start : start + size], [IGNORED, *targets[start + 1 : start + size]]


def blocks(documents: Sequence[Tokens], size: int) -> list[dict[str, list[int]]]:
    """Blocks of at most `size` tokens, "position_ids" beginning at 0 with each document.

    documents: each of at most `size` tokens.
    """
    return [_block([documents[i] for i in some]) for some in best_fit([len(ids) for ids, _ in documents], size)]


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which documents share a block: indices, those of a block in the order they were put in.

    lengths: of the documents, each at most `size`.   size: of a block.
    """
    found: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # free places -> blocks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((room for room in range(lengths[i], size) if by_room.get(room)), None)
        if room is None:
            found.append([])
            room, block = size, len(found) - 1
        else:
            block = by_room[room].pop()
        found[block].append(i)
        by_room[room - lengths[i]].append(block)
    return found


def _block(documents: Sequence[Tokens]) -> dict[str, list[int]]:
    return {
        "input_ids": [i for ids, _ in documents for i in ids],
        "targets": [target for _, targets in documents for target in targets],
        "position_ids": [t for ids, _ in documents for t in range(len(ids))],
    }
