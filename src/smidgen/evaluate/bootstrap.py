"""How far a score may be off: percentile bootstrap over the examples.  Efron & Tibshirani 1993, chapter 13.

    theta_b = metric(examples drawn with replacement),  b = 1 .. resamples
    interval = the (1 - level) / 2 and (1 + level) / 2 quantiles of the theta_b

Two models judged on the same examples are compared on the same draws: the paired interval is narrower than the two
intervals side by side, and it alone answers whether one is better.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from smidgen.core.errors import require

Metric = Callable[[Tensor, Tensor], float]  # (predictions, targets), both with one example per row


def bootstrap_interval(
    metric: Metric, predictions: Tensor, targets: Tensor, *, seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The interval (low, high) of `metric(predictions, targets)`.

    predictions: (N, ...).   targets: (N, ...).
    Draws on which the metric is undefined (NaN) are left out; if it is on all, both ends are NaN.
    Raises ConfigError if there is no example, the two differ in length, or a setting cannot be.
    """
    _check({"predictions": predictions, "targets": targets}, resamples, level)
    return _interval(lambda rows: metric(predictions[rows], targets[rows]), targets, seed, resamples, level)


def paired_difference_interval(
    metric: Metric,
    predictions_a: Tensor,
    predictions_b: Tensor,
    targets: Tensor,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval (low, high) of metric(a) - metric(b), both judged on the same draws.

    predictions_a, predictions_b: (N, ...).   targets: (N, ...).   Otherwise as `bootstrap_interval`.
    """
    _check({"predictions_a": predictions_a, "predictions_b": predictions_b, "targets": targets}, resamples, level)

    def difference(rows: Tensor) -> float:
        return metric(predictions_a[rows], targets[rows]) - metric(predictions_b[rows], targets[rows])

    return _interval(difference, targets, seed, resamples, level)


def _interval(
    statistic: Callable[[Tensor], float], targets: Tensor, seed: int, resamples: int, level: float
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so every device gives the same interval
    count = len(targets)
    values = []
    for _ in range(resamples):  # one draw at a time: all at once is resamples * N indices, 8 GB at a million rows
        rows = torch.randint(count, (count,), generator=generator).to(targets.device)
        values.append(float(statistic(rows)))
    defined = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(defined):
        return math.nan, math.nan
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(defined, ends).tolist()
    return low, high


def _check(tensors: dict[str, Tensor], resamples: int, level: float) -> None:
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    require(len(set(lengths.values())) == 1, f"The bootstrap needs one row per example in each; it got {lengths}.")
    require(min(lengths.values()) > 0, "The bootstrap draws from examples; there are none.")
    require(resamples >= 1, f"resamples is {resamples}; the bootstrap needs at least 1, and 1000 is usual.")
    require(0 < level < 1, f"level is {level}; it is a share between 0 and 1, such as 0.95.")
