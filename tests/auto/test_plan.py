"""The plan fills in what nobody said, and says why."""

import torch

from smidgen.auto.plan import (
    Plan,
    choose_precision,
    choose_products,
    choose_steps,
    evaluation_interval,
    shorter_length,
)

CPU = torch.device("cpu")


def test_what_is_said_stands_and_what_is_not_is_chosen_with_a_reason():
    plan = Plan()
    assert plan.decide("batch", 8, 32, "fits") == 8
    assert plan.decide("seed", None, 0, "the usual") == 0
    plan.replace("batch", 4, "halved")
    assert plan.entries == [("batch", "4", "halved"), ("seed", "0", "the usual")]


def test_sixteen_bit_is_chosen_only_where_it_is_measured_faster():
    import time

    def run(costs):
        return lambda precision: time.sleep(costs[precision])

    assert choose_precision(run({"fp32": 0.02, "bf16": 0.005}), CPU)[0] == "bf16"
    assert choose_precision(run({"fp32": 0.005, "bf16": 0.02}), CPU)[0] == "fp32"


def test_steps_are_the_epochs_where_the_time_allows_and_what_fits_where_not():
    common = {"said": None, "rows": 3200, "per_step": 32, "epochs": 3.0, "seconds_per_step": 1.0}
    assert choose_steps(**common, seconds_left=None)[0] == 300
    assert choose_steps(**common, seconds_left=1000.0)[0] == 300
    steps, why = choose_steps(**common, seconds_left=150.0)
    assert steps == 150
    assert "1.5 epochs" in why
    assert choose_steps(**common, seconds_left=-5.0)[0] == 40  # never nothing


def test_a_tiny_data_set_is_seen_more_often_but_not_without_end():
    assert choose_steps(said=None, rows=64, per_step=8, epochs=3.0, seconds_per_step=0.01, seconds_left=None)[0] == 40
    assert choose_steps(said=None, rows=8, per_step=8, epochs=1.0, seconds_per_step=0.01, seconds_left=None)[0] == 20


def test_about_eight_evaluations_in_a_run():
    assert [evaluation_interval(n) for n in (1, 8, 100, 800)] == [1, 1, 13, 100]


def test_texts_are_cut_shorter_only_where_an_epoch_does_not_fit():
    assert shorter_length(128, tokens=10_000, seconds_per_token=1e-3, minutes=3) == 128
    assert shorter_length(128, tokens=1_000_000, seconds_per_token=1e-3, minutes=3) == 64
    assert shorter_length(48, tokens=1_000_000, seconds_per_token=1e-3, minutes=3) == 48


def test_the_choose_products_is_measured():
    library, faster = choose_products(64, 48, 32)
    assert library == ("onednn" if faster > 1.05 else "usual")
    assert choose_products(1, 48, 32) == ("usual", 1.0)
