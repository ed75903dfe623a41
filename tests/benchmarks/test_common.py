"""How the benchmarks take time and memory."""

import gc
import platform
import sys
import time
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def common() -> Any:
    import common

    return common


def test_one_run_gives_cpu_and_wall_time(common):
    asleep = common.seconds_of(lambda: time.sleep(0.05))
    assert asleep.wall >= 0.05 > asleep.cpu
    assert common.cpu_seconds(lambda: time.sleep(0.05)) < 0.05


def test_no_garbage_is_collected_while_a_run_is_timed(common):
    was_on = []
    common.seconds_of(lambda: was_on.append(gc.isenabled()))
    assert was_on == [False]
    assert gc.isenabled()


def test_both_clocks_are_read_in_the_same_runs(common):
    runs: list[str] = []
    variants = {"one": lambda: runs.append("one"), "other": lambda: runs.append("other")}
    times = common.timed(variants, 3)
    assert sorted(runs) == ["one"] * 4 + ["other"] * 4  # and one to warm up
    for by_clock in (times.cpu, times.wall):
        assert {name: len(taken) for name, taken in by_clock.items()} == {"one": 3, "other": 3}


def test_every_round_measures_every_variant_once(common):
    measured = common.interleaved({"one": lambda: 1, "other": lambda: 2}, 4, lambda run: 10 * run(), warm_up=False)
    assert measured == {"one": [10] * 4, "other": [20] * 4}


def test_a_ratio_is_formed_inside_each_round(common):
    ratios = common.over({"floor": [1.0, 2.0, 4.0], "it": [2.0, 4.0, 8.0]}, "floor")
    assert (ratios["it"].low, ratios["it"].median, ratios["it"].high) == (2, 2, 2)


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from /proc")
def test_the_gradients_that_a_step_makes_count_though_the_model_had_some(common):
    size = 4 * 3000 * 3000
    model = nn.Linear(3000, 3000, bias=False)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(torch.ones(1, 3000)).sum().backward()

    step()
    assert common.peak_of_step(model, step) > 0.9 * size


def test_versions_name_what_was_imported_to_quantise(common, monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert "bitsandbytes" not in common.packages()
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    assert common.packages()[-1] == "bitsandbytes"
