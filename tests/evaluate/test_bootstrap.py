"""The bootstrap agrees with the formula where there is one, is narrower when paired, and repeats itself."""

import math

import pytest
import torch
from torch import Tensor

from smidgen.core.errors import ConfigError
from smidgen.evaluate.bootstrap import bootstrap_interval, paired_difference_interval


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    return (predictions == targets).double().mean().item()


def answers(share_right: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (count,), generator=generator)
    right = torch.arange(count) < round(share_right * count)
    return torch.where(right, targets, 1 - targets), targets


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    predictions, targets = answers(0.8, 1000, seed=0)
    low, high = bootstrap_interval(accuracy, predictions, targets, seed=0, resamples=2000)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)  # normal approximation
    assert low == pytest.approx(0.8 - half, abs=0.004)
    assert high == pytest.approx(0.8 + half, abs=0.004)


def test_a_higher_level_gives_a_wider_interval() -> None:
    predictions, targets = answers(0.8, 300, seed=0)
    low, high = bootstrap_interval(accuracy, predictions, targets, seed=0)
    lower, higher = bootstrap_interval(accuracy, predictions, targets, seed=0, level=0.99)
    assert lower < low < high < higher


def test_the_same_seed_gives_the_same_interval_and_draws_nothing_from_the_global_generator() -> None:
    predictions, targets = answers(0.7, 50, seed=0)
    state = torch.get_rng_state()
    first = bootstrap_interval(accuracy, predictions, targets, seed=3, resamples=100)
    assert first == bootstrap_interval(accuracy, predictions, targets, seed=3, resamples=100)
    assert first != bootstrap_interval(accuracy, predictions, targets, seed=4, resamples=100)
    assert torch.equal(state, torch.get_rng_state())


def test_paired_models_are_told_apart_where_their_own_intervals_overlap() -> None:
    a, targets = answers(0.82, 500, seed=0)
    b, _ = answers(0.79, 500, seed=0)  # wrong wherever a is, and on 15 more
    low, high = paired_difference_interval(accuracy, a, b, targets, seed=0)
    assert 0 < low < 0.03 < high
    low_a, _ = bootstrap_interval(accuracy, a, targets, seed=0)
    _, high_b = bootstrap_interval(accuracy, b, targets, seed=0)
    assert low_a < high_b


def test_swapping_the_models_turns_the_difference_around() -> None:
    a, targets = answers(0.9, 200, seed=0)
    b, _ = answers(0.6, 200, seed=0)
    low, high = paired_difference_interval(accuracy, a, b, targets, seed=0, resamples=200)
    other_low, other_high = paired_difference_interval(accuracy, b, a, targets, seed=0, resamples=200)
    assert (other_low, other_high) == pytest.approx((-high, -low))


def test_predictions_may_have_any_shape_behind_the_examples() -> None:
    logits = torch.eye(3).repeat(4, 1)  # (12, 3)
    targets = torch.arange(3).repeat(4)
    interval = bootstrap_interval(lambda p, t: accuracy(p.argmax(-1), t), logits, targets, seed=0, resamples=20)
    assert interval == (1.0, 1.0)


def test_draws_on_which_the_metric_is_undefined_are_left_out() -> None:
    def recall(predictions: Tensor, targets: Tensor) -> float:
        positive = targets == 1
        return accuracy(predictions[positive], targets[positive])  # NaN without a positive

    targets = torch.tensor([1, 0, 0, 0, 0])
    assert bootstrap_interval(recall, torch.ones(5, dtype=torch.long), targets, seed=0) == (1.0, 1.0)
    nowhere = bootstrap_interval(recall, targets, torch.zeros(5, dtype=torch.long), seed=0, resamples=10)
    assert all(math.isnan(end) for end in nowhere)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="one row per example"):
        bootstrap_interval(accuracy, torch.zeros(3), torch.zeros(4), seed=0)
    with pytest.raises(ConfigError, match="there are none"):
        bootstrap_interval(accuracy, torch.zeros(0), torch.zeros(0), seed=0)
    with pytest.raises(ConfigError, match="resamples is 0"):
        bootstrap_interval(accuracy, torch.zeros(3), torch.zeros(3), seed=0, resamples=0)
    with pytest.raises(ConfigError, match=r"level is 95"):
        bootstrap_interval(accuracy, torch.zeros(3), torch.zeros(3), seed=0, level=95)
