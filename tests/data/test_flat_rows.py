"""Rows as flat numbers: the same rows again, whatever parts they are in."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smidgen.core.safe import write_tensors
from smidgen.data.flat_rows import FlatRows, flat, from_tensors, mapped_tensors, to_tensors

ROWS = [{"ids": [5, 7], "targets": [-100, 7]}, {"ids": [], "targets": []}, {"ids": [9], "targets": [1 << 40]}]


def test_rows_are_numbers_and_bounds() -> None:
    numbers, bounds = flat(ROWS)["ids"]
    assert numbers.tolist() == [5, 7, 9]
    assert bounds.tolist() == [0, 2, 2, 3]
    assert numbers.dtype == torch.int32
    assert flat(ROWS)["targets"][0].dtype == torch.int64  # too large for 32 bits


def test_rows_come_back_one_by_one_in_any_order() -> None:
    rows = FlatRows([flat(ROWS[:1]), flat(ROWS[1:])])
    assert list(rows) == ROWS
    assert rows[-1] == ROWS[2]
    assert list(rows.select([2, 0, 2])) == [ROWS[2], ROWS[0], ROWS[2]]
    assert list(rows[1:]) == ROWS[1:]
    assert list(rows.select([2, 0]).select([1])) == [ROWS[0]]
    with pytest.raises(IndexError):
        rows[3]


@given(rows=st.lists(st.lists(st.integers(-100, 1 << 35), max_size=5), min_size=1, max_size=12), cut=st.integers(0, 12))
def test_their_sha256_is_of_the_rows_and_not_of_the_parts(rows: list[list[int]], cut: int) -> None:
    named = [{"ids": row} for row in rows]
    parts = [flat(some) for some in (named[:cut], named[cut:]) if some]
    assert FlatRows(parts).sha256() == FlatRows([flat(named)]).sha256()
    turned = FlatRows(parts).select(range(len(rows)))
    assert turned.sha256() == FlatRows(parts).sha256()
    longer = [*named, {"ids": [1]}]
    assert FlatRows([flat(longer)]).sha256() != FlatRows(parts).sha256()


def test_they_are_written_and_mapped(tmp_path: Path) -> None:
    write_tensors(tmp_path / "rows.safetensors", to_tensors(flat(ROWS)))
    assert list(FlatRows([from_tensors(mapped_tensors(tmp_path / "rows.safetensors"))])) == ROWS
