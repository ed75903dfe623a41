"""Figures read as people write them."""

import math

import pytest

from smidgen.evaluate import units


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (units.metric_text("accuracy", 0.8412), "84.1 %"),
        (units.metric_text("mcc", 0.6123), "0.612"),
        (units.metric_text("perplexity", 1234.5), "1,234"),
        (units.metric_text("accuracy", math.nan), "n/a"),
        (units.metric_text("loss", math.inf), "inf"),
        (units.interval_text("accuracy", 0.041, 0.083), "[4.1, 8.3]"),
        (units.interval_text("accuracy", -0.0001, 0.02), "[0.0, 2.0]"),
        (units.interval_text("rmse", 9.98, 10.2), "[9.98, 10.20]"),
        (units.interval_text("rmse", math.nan, math.nan), "[n/a]"),
        (units.difference_text("accuracy", 0.062), "6.2 points"),
        (units.difference_text("accuracy", -0.0001), "0.0 points"),
        (units.difference_text("rmse", -0.062), "-0.062"),
        (units.number_text(-0.0001, 1.0), "0.000"),
        (units.number_text(0.00012), "1.2e-04"),
        (units.share_text(0.0), "0 %"),
        (units.share_text(1.0), "100 %"),
        (units.share_text(0.0031), "0.31 %"),
        (units.share_text(0.000042), "0.0042 %"),
        (units.share_text(0.1234), "12.3 %"),
        (units.bytes_text(None), "n/a"),
        (units.bytes_text(912), "912 B"),
        (units.bytes_text(1800), "1.8 KB"),
        (units.bytes_text(412_300), "412 KB"),
        (units.bytes_text(999_700), "1.0 MB"),
        (units.bytes_text(2_100_000_000), "2.1 GB"),
        (units.seconds_text(0.42), "0.42 s"),
        (units.seconds_text(59.7), "1 min 0 s"),
        (units.seconds_text(83.2), "1 min 23 s"),
        (units.seconds_text(7500), "2 h 5 min"),
    ],
)
def test_a_figure_reads_as_people_write_it(said: str, text: str) -> None:
    assert said == text
