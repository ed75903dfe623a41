"""Figures read as people write them."""

import math
from itertools import chain

import pytest

from smidgen.evaluate import units
from smidgen.tasks import labelled
from smidgen.tasks.images.found import Classes
from smidgen.tasks.language import likelihood, writing
from smidgen.tasks.ranking.figures import metrics_at
from smidgen.tasks.registry import tasks
from smidgen.tasks.text.objectives import Objective
from smidgen.tasks.text.spans import SCHEMES, Tags

OF_LABELS = [*labelled._METRICS.values(), labelled._METRICS_OF_CLASSES]
METRICS = {  # of all kinds that a task has
    "causal_lm": [likelihood.METRICS],
    "custom": [["loss"]],  # and what the user's file names
    "embeddings": [kind.metrics for kind in Objective.__subclasses__()],
    "image_classification": OF_LABELS,
    "object_detection": [Classes(["old", "new"], own=1).metrics],
    "recommendation": [metrics_at(10)],
    "seq2seq": [likelihood.METRICS, writing.RATIOS],
    "text_classification": OF_LABELS,
    "token_classification": [Tags(scheme=scheme, names=()).metrics for scheme in SCHEMES],
}
NUMBERS = {"loss", "perplexity", "mae", "r2", "spearman", "pearson", "mcc"}  # neither shares nor given in per cent


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (units.metric_text("accuracy", 0.8412), "84.1 %"),
        (units.metric_text("mcc", 0.6123), "0.612"),
        (units.metric_text("perplexity", 1234.5), "1,234"),
        (units.metric_text("map50_95", 0.6123), "61.2 %"),
        (units.metric_text("map50 old", 0.6123), "61.2 %"),
        (units.metric_text("mrr@10", 0.6123), "61.2 %"),
        (units.metric_text("ndcg@10_tail", 0.6123), "61.2 %"),
        (units.metric_text("recall PER", 0.6123), "61.2 %"),
        (units.metric_text("wer", 1.0712), "107.1 %"),
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


def test_of_every_metric_of_every_task_it_is_known_whether_it_is_a_share() -> None:
    assert {name for name, kind in tasks().items() if kind.__module__ == f"smidgen.tasks.{name}"} == METRICS.keys()
    names = set(chain.from_iterable(chain.from_iterable(METRICS.values())))
    shares = {name for name in names if units.metric_text(name, 0.5) == "50.0 %"}
    assert names - shares == NUMBERS & names
    assert names >= NUMBERS


@pytest.mark.parametrize(
    ("name", "parted"),
    [
        ("f1 PER", ("f1", "PER")),
        ("recall work of art", ("recall", "work of art")),
        ("map50 old", ("map50", "old")),
        ("ndcg@10_tail", ("ndcg@10_tail", None)),
        ("error after an hour", ("error after an hour", None)),
    ],
)
def test_a_share_of_one_part_is_told_from_other_names(name: str, parted: tuple[str, str | None]) -> None:
    assert units.metric_and_part(name) == parted
