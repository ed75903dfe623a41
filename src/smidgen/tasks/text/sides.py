"""The texts of rows that have several, a query and its documents: with their prompts, as tokens, as batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ...data.table import Table
from ..base import Batch, Examples
from ..loading import Tokenizer
from .padding import padded_ids
from .pair_columns import PairColumns, Side

_WORTH_A_CALL = 0.25  # share of the places of a batch


@dataclass(frozen=True)
class Sides:
    """A tokenizer, and what is put before queries ("text") and before documents, right and wrong."""

    tokenizer: Tokenizer
    query_prompt: str = ""
    document_prompt: str = ""

    def _encoded(self, columns: PairColumns, table: Table, **how: Any) -> dict[Side, Any]:
        prompts = {"text": self.query_prompt}
        texts = columns.texts(table).items()
        sides = {side: [prompts.get(side, self.document_prompt) + text for text in some] for side, some in texts}
        return {side: cast(Any, self.tokenizer)(some, **how) for side, some in sides.items()}

    def lengths(self, columns: PairColumns, table: Table) -> list[int]:
        """Of the longest text of each row in tokens, uncut."""
        sides = [side["input_ids"] for side in self._encoded(columns, table, verbose=False).values()]
        return [max(map(len, row)) for row in zip(*sides, strict=True)]

    def examples(self, columns: PairColumns, table: Table, targets: Tensor, max_length: int | None) -> Examples:
        """Rows ready for the model."""
        sides = self._encoded(columns, table, truncation=True, max_length=max_length)
        inputs = [{str(name): side["input_ids"][i] for name, side in sides.items()} for i in range(len(table))]
        cut = sum(any(side.encodings[i].overflowing for side in sides.values()) for i in range(len(table)))
        return Examples(inputs, targets, [max(map(len, row.values())) for row in inputs], cut)

    def batch(self, examples: Examples, indices: Sequence[int]) -> Batch:
        """The rows at these indices as `Embedder` takes them."""
        rows = {side: [examples.inputs[i][side] for i in indices] for side in examples.inputs[indices[0]]}
        return sides_as_batch(rows, cast(int, self.tokenizer.pad_token_id or 0)) | examples.targets_at(indices)


def sides_as_batch(sides: Mapping[str, Sequence[Sequence[int]]], filler: int) -> Batch:
    """The tokens of each side's B texts: all sides as one (S B, T), or each apart.

    A side apart saves the padding up to the longest text of all sides, and costs a call: apart they go where at least
    a quarter of the places would be padding of that kind.
    """
    longest = [max(map(len, rows)) for rows in sides.values()]
    if 1 - sum(longest) / (len(longest) * max(longest)) < _WORTH_A_CALL:
        return padded_ids([row for rows in sides.values() for row in rows], filler)
    return {
        f"{name}.{side}": tensor for side, rows in sides.items() for name, tensor in padded_ids(rows, filler).items()
    }
