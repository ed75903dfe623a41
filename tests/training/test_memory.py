"""Memory: what is kept, what is free, and a batch that is cut until it fits."""

import math

import pytest
import torch
from torch import nn

from smidgen.core.errors import NonFiniteError, OutOfMemory
from smidgen.training import checkpoint, memory
from smidgen.training.memory import fitting, is_out_of_memory, kept_for_backward, rows_at_once

from .toy import At, Means, digest, loop, rows


def test_what_a_graph_keeps_counts_storages_once_and_no_weights():
    layer, x = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert kept_for_backward(layer, lambda: layer(x).exp()) == 4 * (7 * 3 + 7 * 5)  # x; what exp gave out
    assert kept_for_backward(layer, lambda: (x[:2].sin(), x.cos())) == 4 * 7 * 3


def test_a_weight_made_of_other_tensors_counts_as_one_and_what_is_made_of_them_counts_whole():
    """As in torchao's layers in few bits: such a tensor has no storage of its own."""
    from torch.testing._internal.two_tensor import TwoTensor

    layer, x = nn.Linear(3, 5, bias=False), torch.randn(7, 3, requires_grad=True)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(5, 3), torch.ones(5, 3)), requires_grad=False)
    assert kept_for_backward(layer, lambda: layer(x)) == 0
    assert kept_for_backward(layer, lambda: layer(x).exp()) == 2 * 4 * 7 * 5


def test_measuring_leaves_nothing_behind():
    """`exp` keeps its own output: handed back as it is, it would hold its own graph for ever."""
    import weakref

    x, seen = torch.randn(3, requires_grad=True), []

    def run():
        y = x * 2
        seen.append(weakref.ref(y))
        return y.exp()

    kept_for_backward(nn.Identity(), run)
    assert seen[0]() is None


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (CPU, True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_did_not_suffice(error, is_one):
    assert is_out_of_memory(error) == is_one


@pytest.mark.parametrize("batch", [64, 48, 7])
def test_what_fits_is_found_in_few_tries(batch, monkeypatch):
    """Where `most` rows fit, for every `most`: halved log2(batch / most) times, rounded up, and no more."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)  # a tenth of a second each time
    for most in range(1, 65):
        tried: list[int] = []

        def run(split: int, most: int = most, tried: list[int] = tried) -> str:
            tried.append(rows_at_once(batch, split))
            if tried[-1] > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return "done"

        assert fitting(run, batch, 1)[0] == "done"
        assert tried[-1] <= most < (tried[-2] if len(tried) > 1 else 65)
        assert len(tried) <= max(0, math.ceil(math.log2(batch / most))) + 2


def test_one_row_that_does_not_fit_ends_the_run_and_so_does_another_process_that_waits():
    def run(split: int) -> None:
        raise CPU

    with pytest.raises(
        OutOfMemory, match=r"1 row at a time do not fit in memory \(\[enforce fail.*train\.recompute: all"
    ):
        fitting(run, 5, 1)
    with pytest.raises(OutOfMemory, match=r"8 rows at a time .*With several processes .* lower train\.batch"):
        fitting(run, 8, 1, alone=False)
    with pytest.raises(ZeroDivisionError):
        fitting(lambda split: 1 / 0, 8, 1)


class Short(Means):
    """As on a machine where so many rows fit while gradients are on; writes down what was run."""

    def __init__(self, most: int, error: type[BaseException] = RuntimeError):
        self.most, self.error, self.steps = most, error, []

    def loss(self, outputs, batch):
        if torch.is_grad_enabled():
            self.steps.append(len(batch["targets"]))
            if len(batch["targets"]) > self.most:
                raise self.error("DefaultCPUAllocator: can't allocate memory")
        return super().loss(outputs, batch)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 16])
def test_a_run_short_of_memory_takes_the_steps_of_one_that_is_not(most):
    plain = loop(batch=16, steps=5, dropout=0.0, train=rows(40))
    short = loop(batch=16, steps=5, dropout=0.0, train=rows(40), task=Short(most))
    plain.run(At())
    outcome = short.run(At())
    assert outcome.split == 16 // 2 ** int(math.log2(most))
    assert sum(size > most for size in short.task.steps) == math.log2(outcome.split)  # found once, kept from then on
    for name, tensor in plain.trained.items():
        torch.testing.assert_close(short.trained[name], tensor, rtol=0, atol=1e-6)
    losses = [[value for _, value in run.history["curves"]["train loss"]] for run in (short, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_the_random_numbers_of_a_step_are_the_same_when_it_starts_again(error):
    """A run that knows from the start draws as one that has to find out."""
    knows = loop(batch=4, split=2, steps=6, dropout=0.5)
    knows.run(At())
    finds = loop(batch=4, steps=6, dropout=0.5, task=Short(2, error))
    finds.run(At())
    assert digest(finds) == digest(knows)


def test_a_resumed_run_finds_what_was_chosen(tmp_path):
    """The process that resumes has no fault of its own, and still runs what its predecessor found."""
    unbroken = loop(tmp_path / "unbroken", batch=4, steps=8, task=Short(2))
    unbroken.run(At())
    loop(tmp_path / "stopped", batch=4, steps=8, task=Short(2)).run(At([3]))
    resumed = loop(tmp_path / "stopped", batch=4, steps=8, task=Short(2))
    resumed.resume(checkpoint.newest(tmp_path / "stopped")[1])
    assert resumed.run(At()).split == 2
    assert max(resumed.task.steps) == 2
    assert digest(resumed) == digest(unbroken)


def test_what_is_no_lack_of_memory_ends_a_run_as_before():
    class Broken(Means):
        def loss(self, outputs, batch):
            total, count = super().loss(outputs, batch)
            return (total * math.nan if torch.is_grad_enabled() else total), count

    with pytest.raises(NonFiniteError):
        loop(task=Broken()).run(At())
