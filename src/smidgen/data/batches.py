"""Batches of rows of similar length, so that little is padded.

The rows are shuffled, taken 50 batches at a time, sorted by length within those, cut into batches, and the batches are
shuffled.  All follows from (seed, epoch): a resumed run needs only the epoch and how many batches were done.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from smidgen.core.errors import require

_SORTED_TOGETHER = 50  # batches; more would pad less and mix less


class PaddingShare(NamedTuple):
    """Padded positions, as a share of all positions computed."""

    bucketed: float
    random: float


class LengthBucketedBatches:
    """An iterable of lists of row indices.

    lengths: one per row, in tokens.   batch_size: rows per rank.   rank, world: this process, and how many there are.
    shuffle: False goes through all rows once, longest first, the same in every epoch.
    drop_last: leave out the rows that do not fill a batch on every rank; they differ from epoch to epoch.

    Every rank gets the same number of batches, and at the same step rows of similar length.  The last rows are dealt
    evenly; if they are fewer than ranks, some come twice (`world - 1` at most).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        require(batch_size > 0, f"batch_size is {batch_size}; a batch has at least 1 row")
        require(0 <= rank < world, f"rank is {rank}; of {world} ranks they are 0 to {world - 1}")
        require(
            len(lengths) >= (batch_size * world if drop_last else 1),
            f"{len(lengths)} rows give no batch of {batch_size} on {world} ranks. Lower batch_size, or add rows.",
        )
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; the same number gives the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        whole, rest = divmod(len(self.lengths), self.batch_size * self.world)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps(is_sorted=True):
            yield step[self.rank]

    def padding_share(self) -> PaddingShare:
        """How much of this epoch is padding, over all ranks, and how much it would be with batches drawn at random."""
        return PaddingShare(self._padding(is_sorted=True), self._padding(is_sorted=False))

    def _steps(self, *, is_sorted: bool) -> list[list[list[int]]]:
        """The epoch: steps x ranks x rows."""
        generator = random.Random(f"{self.seed}:{self.epoch}")  # a string is hashed with SHA-512, the same everywhere
        order = list(range(len(self.lengths)))
        if self.shuffle or not is_sorted:
            generator.shuffle(order)
        per_step = self.batch_size * self.world
        if self.drop_last:
            order = order[: len(order) // per_step * per_step]
        together = per_step * _SORTED_TOGETHER if self.shuffle else len(order)
        steps = []
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            if is_sorted:
                rows.sort(key=lambda i: -self.lengths[i])
            steps += [self._deal(rows[first : first + per_step]) for first in range(0, len(rows), per_step)]
        if self.shuffle:
            generator.shuffle(steps)
        return steps

    def _deal(self, rows: list[int]) -> list[list[int]]:
        """The rows of one step to the ranks, neighbours together, as evenly as they go."""
        while len(rows) < self.world:
            rows = rows + rows[: self.world - len(rows)]
        return [rows[len(rows) * r // self.world : len(rows) * (r + 1) // self.world] for r in range(self.world)]

    def _padding(self, *, is_sorted: bool) -> float:
        batches = [[self.lengths[i] for i in rows] for step in self._steps(is_sorted=is_sorted) for rows in step]
        computed = sum(len(batch) * max(batch) for batch in batches)
        return 1 - sum(map(sum, batches)) / computed if computed else 0.0
