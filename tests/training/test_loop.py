"""What the loop promises: the same gradient however a step is split, the same bits however a run is interrupted."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smidgen.core.errors import NonFiniteError
from smidgen.core.files import sha256_file
from smidgen.training import checkpoint

from .toy import At, Means, digest, interrupted_and_resumed, loop, rows


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_many_small_batches_make_the_step_of_one_large():
    """7 rows of unequal length: batches of 2, 2, 2 and 1 have the gradient of all 7, padded otherwise as they are."""
    whole = loop(train=rows(7), batch=7, steps=5, dropout=0.0)
    parts = loop(train=rows(7), batch=2, accumulate=4, steps=5, dropout=0.0)
    assert len({*whole.train_set.lengths}) > 3
    for run in (whole, parts):
        run.run(At())
    for name, tensor in whole.trained.items():
        torch.testing.assert_close(parts.trained[name], tensor, rtol=0, atol=1e-6)
    losses = [[value for _, value in run.history["curves"]["train loss"]] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_learning_rate_rises_and_falls_in_a_line():
    run, seen = loop(steps=10, warmup=0.2), []
    run.run(At(range(99), lambda step: seen.append([group["lr"] / 0.02 for group in run.optimizer.param_groups])))
    assert all(rate == pytest.approx(rates[0]) for rates in seen for rate in rates)
    assert [rates[0] for rates in seen] == pytest.approx([1 / 2, 1, *(k / 8 for k in range(8, 0, -1))])


def test_only_matrices_decay():
    run = loop()
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in run.trained.items()} == {
        name: 0.01 if p.ndim == 2 and not name.startswith("head") else 0.0 for name, p in run.trained.items()
    }


class Scripted(Means):
    """Says these values one after the other."""

    def __init__(self, values, higher_is_better=True):
        self.values = list(values)
        self.metrics_below = frozenset() if higher_is_better else frozenset({"accuracy"})
        self.judged = 0

    def loss(self, outputs, batch):
        if torch.is_grad_enabled():
            return super().loss(outputs, batch)
        self.judged += 1
        return torch.tensor(float(self.judged)), 1  # of the validation rows: always rising, so that the values decide

    def score(self, answers, targets):
        return {"accuracy": self.values.pop(0)}


def test_the_start_is_judged_too_and_kept_where_training_only_harms():
    run = loop(task=Scripted([0.9, 0.1, 0.2, 0.3]), steps=12, evaluate_every=4)
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    outcome = run.run(At())
    assert outcome.curves["valid accuracy"] == [(0, 0.9), (4, 0.1), (8, 0.2), (12, 0.3)]
    assert (outcome.stopped, outcome.step, outcome.best_step, outcome.best_value) == ("finished", 12, 0, 0.9)
    for name, tensor in before.items():
        assert torch.equal(run.trained[name], tensor)


@pytest.mark.parametrize("values", [[0.0, 0.5, 0.7, 0.7, 0.6, 0.9], [0.9, 0.5, 0.3, 0.3, 0.4, 0.1]])
def test_patience_counts_evaluations_without_a_better_one(values):
    """Equal is not better; the state of step 4 comes back, and the better value after step 8 is never seen."""
    run, kept = loop(task=Scripted(values, higher_is_better=values[0] == 0.0), evaluate_every=2, patience=2), {}
    outcome = run.run(At([4], lambda step: kept.update({n: p.detach().clone() for n, p in run.trained.items()})))
    assert (outcome.stopped, outcome.step, outcome.best_step) == ("early", 8, 4)
    for name, tensor in kept.items():
        assert torch.equal(run.trained[name], tensor)


def test_a_best_value_of_zero_is_zero():
    assert loop(task=Scripted([0.0] * 4)).run(At()).best_value == 0.0


def test_a_run_killed_after_its_patience_was_over_does_not_go_on(tmp_path):
    first = loop(tmp_path, task=Scripted([0.5, 0.4, 0.3]), evaluate_every=2, patience=2)
    assert first.run(At()).stopped == "early"
    again = loop(tmp_path, task=Scripted([]), evaluate_every=2, patience=2)
    again.resume(checkpoint.newest(tmp_path)[1])
    assert (again.run(At()).stopped, again.step) == ("early", 4)
    assert digest(again) == digest(first)


def test_every_evaluation_and_every_so_many_steps_are_saved(tmp_path):
    seen = []
    loop(tmp_path, steps=9, save_every=3, evaluate_every=4).run(
        At(range(99), lambda step: seen.append(names(tmp_path)[-1]))
    )
    assert seen == [f"step-{step:08d}" for step in (0, 0, 0, 3, 4, 4, 6, 6, 8)]
    assert names(tmp_path) == ["step-00000008", "step-00000009"]


def test_an_interrupted_run_saves_and_leaves(tmp_path):
    run = loop(tmp_path, save_every=100)
    outcome = run.run(At([3]))
    assert (outcome.stopped, outcome.step) == ("interrupted", 3)
    state = checkpoint.newest(tmp_path)[1]
    assert state.step == 3
    for name, tensor in state.tensors.items():
        assert torch.equal(run.trained[name], tensor)


def test_a_run_asked_to_stop_at_its_last_step_is_finished(tmp_path):
    assert loop(tmp_path).run(At([12])).stopped == "finished"


class Peaked(Means):
    """Judged by how sure the model is, which rises and falls again: the best is neither the first nor the last."""

    def score(self, answers, targets):
        return {"accuracy": float(answers.abs().mean())}


def test_of_equal_values_the_one_with_the_lower_loss_is_better():
    class Falling(Scripted):
        def loss(self, outputs, batch):
            total, count = super().loss(outputs, batch)
            return (total, count) if torch.is_grad_enabled() else (-total, count)

    outcome = loop(task=Falling([0.5, 0.5, 0.5, 0.4]), steps=12, evaluate_every=4, patience=1).run(At())
    assert (outcome.stopped, outcome.best_step) == ("finished", 8)  # a falling loss is progress: patience is not over


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, precision):
    """Dropout, shuffling, accumulation over the ends of epochs, a rising and falling learning rate, a best state."""
    settings = {"precision": precision, "accumulate": 2, "steps": 30, "evaluate_every": 7, "save_every": 100}
    settings["task"] = Peaked()
    unbroken = loop(tmp_path / "unbroken", **settings)
    expected = unbroken.run(At())
    assert 0 < expected.best_step < 30  # so that the best state has to survive the stops
    moments = random.Random(0)
    for number in range(5):
        stops = sorted(moments.sample(range(1, 30), 1 + number % 3))
        folder = tmp_path / f"stopped-{number}"
        resumed, outcome = interrupted_and_resumed(folder, stops, **settings)
        assert digest(resumed) == digest(unbroken), stops
        assert outcome.curves == expected.curves, stops
        last = [sha256_file(path / "step-00000030" / checkpoint.TRAINED) for path in (tmp_path / "unbroken", folder)]
        assert last[0] == last[1]


def test_the_two_precisions_and_two_seeds_differ():
    """Else the test above compares nothing."""
    runs = [loop(), loop(precision="bf16"), loop(seed=1), loop(dropout=0.0), loop(accumulate=2)]
    for run in runs:
        run.run(At())
    assert len({digest(run) for run in runs}) == len(runs)


def test_what_ran_before_in_the_process_changes_nothing():
    first = loop()
    first.run(At())
    torch.rand(5), random.random()
    second = loop()
    second.run(At(range(99), lambda step: torch.rand(step)))
    assert digest(second) == digest(first)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    """The best state is in each checkpoint, so the one before is enough."""
    settings = {"steps": 6, "evaluate_every": 2}
    unbroken = loop(tmp_path / "unbroken", task=Scripted([0.1, 0.9, 0.2, 0.8]), **settings)
    unbroken.run(At())
    loop(tmp_path / "damaged", task=Scripted([0.1, 0.9, 0.2]), **settings).run(At([5]))
    assert names(tmp_path / "damaged") == ["step-00000004", "step-00000005"]  # and not 2, the best
    (tmp_path / "damaged" / "step-00000005" / checkpoint.TRAINED).write_bytes(b"")
    resumed = loop(tmp_path / "damaged", task=Scripted([0.8]), **settings)
    path, state, damaged = checkpoint.newest(tmp_path / "damaged")
    assert (path.name, len(damaged)) == ("step-00000004", 1)
    resumed.resume(state)
    assert resumed.run(At()).best_step == 2
    assert digest(resumed) == digest(unbroken)


def poison_weight(run, step):
    with torch.no_grad():
        run.trained["up.A"][0, 1] = math.nan


def poison_gradient(run, step):
    run.trained["up.B"].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.inf))


def poison_loss(run, step):
    loss = run.task.loss
    run.task.loss = lambda outputs, batch: (loss(outputs, batch)[0] * math.inf, len(batch["targets"]))


def poison_base(run, step):
    with torch.no_grad():
        run.model.body.embedding.weight[:, 2] = math.inf


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_weight, r"step 7: the loss is nan: 1 of 6 tensors: body\.up\S*A \(1 nan, 0 inf of 12\)"),
        (poison_gradient, r"step 7: gradients are not finite: 1 of 6 tensors: body\.up\S*B \(0 nan, 2 inf of 24\)"),
        (poison_loss, r"step 7: the loss is inf"),
        (
            poison_base,
            r"step 7: .* Frozen weights are not finite either: body\.embedding\.weight \(0 nan, 10 inf of 60\)",
        ),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(tmp_path, poison, message):
    run = loop(tmp_path, evaluate_every=100, save_every=5)
    with pytest.raises(NonFiniteError, match=message):
        run.run(At([6], lambda step: poison(run, step)))
    _, state, damaged = checkpoint.newest(tmp_path)
    assert (state.step, damaged) == (5, [])
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())
    healthy = loop(tmp_path)
    healthy.resume(state)
    assert healthy.run(At()).stopped == "finished"


def test_a_weight_gone_wrong_in_the_last_step_is_not_saved(tmp_path):
    run = loop(tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 12: trained tensors are not finite, so nothing was saved: 1 of 6"):
        run.run(At([12], lambda step: poison_weight(run, step)))
    assert names(tmp_path)[-1] == "step-00000011"


def test_two_processes_learn_what_one_does_and_resume_to_the_same_bits(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("toy.py")
    with subprocess.Popen([*launch, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ran:
        try:
            said, _ = ran.communicate(timeout=100)
        finally:
            ran.terminate()  # a rank that waits for ever ends with the launcher
    assert ran.returncode == 0, said.decode()
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["digests"] == ranks[1]["digests"]
    plain, unbroken, resumed = ranks[0]["digests"]
    assert resumed == unbroken != plain
    assert ranks[0]["histories"][0] == ranks[0]["histories"][1]
    alone = loop(batch=4, dropout=0.0)  # 2 x 2 rows a step
    alone.run(At())
    for name, tensor in alone.trained.items():
        torch.testing.assert_close(torch.tensor(ranks[0]["plain"][name]), tensor.detach(), rtol=0, atol=1e-5)
    for curve, points in alone.history["curves"].items():
        assert [value for _, value in ranks[0]["curves"][curve]] == pytest.approx(
            [value for _, value in points], abs=1e-5
        )
