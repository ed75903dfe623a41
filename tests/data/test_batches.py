"""Batches: every row once, the same on every rank and after a resume, and little padding."""

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.errors import ConfigError
from smidgen.data.batches import LengthBucketedBatches


def ranks(lengths: list[int], world: int, **settings: object) -> list[list[list[int]]]:
    made = [
        LengthBucketedBatches(lengths, batch_size=4, seed=0, rank=rank, world=world, **settings)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    assert [len(list(batches)) for batches in made] == [len(batches) for batches in made]
    return [list(batches) for batches in made]


@given(n=st.integers(1, 90), world=st.integers(1, 5), shuffle=st.booleans())
def test_every_row_comes_once_and_all_ranks_have_as_many_batches(n: int, world: int, shuffle: bool) -> None:
    lengths = [(7 * i) % 13 + 1 for i in range(n)]
    per_rank = ranks(lengths, world, shuffle=shuffle)
    assert len({len(batches) for batches in per_rank}) == 1
    seen = [i for batches in per_rank for batch in batches for i in batch]
    assert set(seen) == set(range(n))
    assert len(seen) - n == max(0, -n % (4 * world) - 3 * world)  # only where the last rows are fewer than ranks
    assert all(1 <= len(batch) <= 4 for batches in per_rank for batch in batches)


@given(n=st.integers(20, 90), world=st.integers(1, 5))
def test_drop_last_leaves_only_full_batches(n: int, world: int) -> None:
    per_rank = ranks([1] * n, world, drop_last=True)
    assert all(len(batch) == 4 for batches in per_rank for batch in batches)
    assert sum(len(batches) for batches in per_rank) == n // (4 * world) * world


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = [random.Random(0).randint(1, 60) for _ in range(500)]
    used = LengthBucketedBatches(lengths, batch_size=8, seed=1)
    for epoch in range(3):
        used.set_epoch(epoch)
        list(used)
    resumed = LengthBucketedBatches(lengths, batch_size=8, seed=1)
    resumed.set_epoch(2)
    assert list(islice(resumed, 20, None)) == list(used)[20:]
    resumed.set_epoch(1)
    assert list(resumed) != list(used)
    other_seed = LengthBucketedBatches(lengths, batch_size=8, seed=2)
    other_seed.set_epoch(2)
    assert list(other_seed) != list(used)


def test_ranks_see_rows_of_similar_length_at_the_same_step() -> None:
    lengths = list(range(1, 801))
    for first, second in zip(*ranks(lengths, 2), strict=True):
        both = [lengths[i] for i in first + second]
        assert max(both) - min(both) < 60


def test_without_shuffling_the_longest_come_first() -> None:
    lengths = [3, 9, 1, 9, 5]
    assert list(LengthBucketedBatches(lengths, batch_size=2, seed=0, shuffle=False)) == [[1, 3], [4, 0], [2]]


def test_buckets_save_most_of_the_padding() -> None:
    generator = random.Random(0)
    lengths = [max(1, int(generator.lognormvariate(3, 0.6))) for _ in range(2000)]
    share = LengthBucketedBatches(lengths, batch_size=16, seed=0).padding_share()
    assert share.random > 0.4
    assert share.bucketed < 0.1
    assert LengthBucketedBatches([5] * 20, batch_size=4, seed=0).padding_share() == (0.0, 0.0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        LengthBucketedBatches([1], batch_size=0, seed=0)
    with pytest.raises(ConfigError, match="rank is 2; of 2 ranks they are 0 to 1"):
        LengthBucketedBatches([1], batch_size=1, seed=0, rank=2, world=2)
    with pytest.raises(ConfigError, match="3 rows give no batch of 4 on 1 ranks"):
        LengthBucketedBatches([1] * 3, batch_size=4, seed=0, drop_last=True)
