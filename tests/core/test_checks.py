"""Settings that cannot be are refused by name, with what they may be."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from smidgen.core.checks import require_above_zero, require_finite, require_one_of, require_share, require_whole
from smidgen.core.errors import ConfigError


class Settings(SimpleNamespace):
    """Settings of which `width` may be None."""

    width = None


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, math.nan, None])
def test_whole_numbers_are_whole_and_no_truth_values(value: Any):
    with pytest.raises(ConfigError, match=r"rank is .*; it must be a whole number of at least 1$"):
        require_whole(Settings(rank=value), "rank")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (require_finite, (-2.0, 0, 1e30), (math.inf, math.nan)),
        (require_above_zero, (1e-9, 3), (0, -1, math.inf, math.nan)),
        (require_share, (0, 0.5), (1, -0.1, math.nan)),
    ],
)
def test_numbers_out_of_their_range_are_refused(check: Callable[..., None], good: Any, bad: Any):
    for value in good:
        check(Settings(scale=value), "scale")
    for value in bad:
        with pytest.raises(ConfigError, match="scale is "):
            check(Settings(scale=value), "scale")


def test_values_by_site_are_held_to_the_same():
    with pytest.raises(ConfigError, match="rank is 0"):
        require_whole(Settings(rank=4, rank_pattern={"*.q": 8, "*.v": 0}), "rank")


def test_none_passes_where_it_is_the_default():
    require_whole(Settings(), "width")
    with pytest.raises(ConfigError, match="at least 1, or None"):
        require_whole(Settings(width=0), "width")


def test_words_are_one_of_those_known():
    with pytest.raises(ConfigError, match=r'start is "pisa"; it is one of kaiming, pissa$'):
        require_one_of(Settings(start="pisa"), "start", ("kaiming", "pissa"))
