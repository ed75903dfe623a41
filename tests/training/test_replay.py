"""Rows of the frozen part, computed once and given again: what is kept, that nothing changes, and what is refused."""

import copy
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smidgen
from smidgen import LoRA
from smidgen.recipes.prepare import make_accelerator
from smidgen.tasks.base import Examples, TaskModel
from smidgen.training import checkpoint
from smidgen.training.loop import Group, Loop, Settings, predict
from smidgen.training.replay import Replay, find_replay
from smidgen.training.replay_store import Store

from .toy import At, Means, digest, rows

WIDE = 1 << 30


class Block(nn.Module):
    """Tokens see the mean of all that are no padding."""

    def __init__(self, width=6):
        super().__init__()
        self.up, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, h, mask):
        mean = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return self.norm(h + torch.tanh(self.up(h + mean)))


class Pair(Block):
    """Hands on a second tensor beside the hidden states, as T5's blocks do their position bias."""

    def forward(self, h, mask):
        return super().forward(h, mask), mask


class Deep(nn.Module):
    """An embedding, three blocks, the mean.   skip: the first block's output is read at the end too."""

    def __init__(self, block=Block, skip=False):
        super().__init__()
        self.embedding, self.skip = nn.Embedding(10, 6), skip
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, batch):
        h, mask, first = self.embedding(batch["digits"]), batch["mask"][:, :, None], None
        for block in self.blocks:
            h = block(h, mask)
            h = h[0] if isinstance(h, tuple) else h
            first = h if first is None else first
        h = h + first if self.skip else h
        return (h * mask).sum(1) / mask.sum(1)


class Summed(nn.Module):
    """Counts of the digits through a stack of layers: rows without a length."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6))
        self.layers = nn.Sequential(*layers)

    def forward(self, batch):
        counts = F.one_hot(batch["digits"], 10).float() * batch["mask"][:, :, None]
        return self.layers(counts.sum(1)[:, :6])


class Model(TaskModel):
    def __init__(self, body, width=6):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 2)

    def forward(self, batch):
        return self.head(self.body(batch).float())


ACCELERATOR = make_accelerator(torch.device("cpu"))


def made(body=Deep, targets="blocks.2.up", dropout=0.0):
    torch.manual_seed(0)
    model = Model(body())
    adapters = smidgen.attach(model.body, LoRA(rank=2, dropout=dropout, targets=targets), seed=0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)  # so that A has a gradient too
    return model, adapters


def found(model, task=None, examples=None):
    return find_replay(model, task or Means(), examples or rows(22), ACCELERATOR)


def replay_of(model, units, **sets):
    sizes = {name: len(examples) for name, examples in sets.items()}
    return Replay(model, units, Store(sizes, limit_bytes=WIDE), sets)


def kept(units):
    return [unit.path for unit in units if unit.read]


def gradients(model, batch, task=None):
    model.zero_grad()
    loss, _ = (task or Means()).loss(model(batch), batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_last_frozen_block_is_kept_and_those_below_do_not_run():
    model, _ = made()
    units, why = found(model)
    assert (kept(units), why) == (["body.blocks.1"], "")
    examples, calls = rows(22), Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    replay = replay_of(model, units, train=examples)
    replay.fill("train", Means(), ACCELERATOR, 8)
    assert calls["body.blocks.0.up"] == calls["body.blocks.2.up"] == 3
    batch = Means().collate(examples, [3, 1, 7])
    with replay.rows(examples, [3, 1, 7]):
        model(batch)
    assert (calls["body.blocks.0.up"], calls["body.blocks.1.up"], calls["body.blocks.2.up"]) == (3, 3, 4)


def test_in_the_batch_in_which_they_were_recorded_rows_replay_to_the_bit():
    model, _ = made()
    units, _ = found(model)
    examples, some = rows(22), [4, 0, 9, 2]
    batch, replay = Means().collate(examples, some), replay_of(model, units, train=examples)
    with torch.no_grad(), replay.rows(examples, some):
        recorded = model(batch)
    expected = gradients(model, batch)
    with replay.rows(examples, some):
        again = gradients(model, batch)
    assert torch.equal(recorded, model(batch))
    assert all(map(torch.equal, again, expected))


def test_padded_otherwise_rows_replay_to_rounding():
    model, _ = made()
    units, _ = found(model)
    examples = rows(22)
    replay = replay_of(model, units, train=examples)
    replay.fill("train", Means(), ACCELERATOR, 22)  # all padded to the longest
    short = [i for i in range(22) if examples.lengths[i] <= 3][:3]
    for some in (short, list(range(22)), [*short, max(range(22), key=lambda i: examples.lengths[i])]):
        batch = Means().collate(examples, some)
        expected = gradients(model, batch)
        with replay.rows(examples, some):
            again = gradients(model, batch)
        for a, b in zip(again, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "targets", "expected"),
    [
        (lambda: Deep(skip=True), "blocks.2.up", {"body.blocks.0", "body.blocks.1"}),  # read above, beside the last
        (lambda: Deep(Pair), "blocks.2.up", None),  # more than one tensor: what is inside is kept instead
        (Summed, "layers.4", {"body.layers.3"}),
    ],
)
def test_what_is_read_is_found_by_its_gradient(body, targets, expected):
    model, _ = made(body, targets)
    units, why = found(model)
    assert units, why
    assert expected is None or set(kept(units)) == expected
    examples = rows(22)
    replay = replay_of(model, units, train=examples)
    replay.fill("train", Means(), ACCELERATOR, 5)
    batch = Means().collate(examples, range(22))
    expected_numbers = gradients(model, batch)
    with replay.rows(examples, range(22)):
        for a, b in zip(gradients(model, batch), expected_numbers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_layer_that_costs_little_beside_what_is_frozen_is_run_and_not_kept():
    """Of the block that is trained the first layers are frozen, and give as many numbers as their input has."""

    class Two(Block):
        def __init__(self):
            super().__init__(width=6)
            self.down = nn.Linear(6, 6)

        def forward(self, h, mask):
            return h + self.down(super().forward(h, mask))

    class Many(Deep):
        def __init__(self):
            super().__init__(Two)
            self.blocks = nn.ModuleList(Two() for _ in range(14))

    model, _ = made(Many, "blocks.13.down")
    units, _ = found(model)
    assert kept(units) == ["body.blocks.12"]


@pytest.mark.parametrize("targets", ["blocks.0.up", "embedding", ["blocks.2.up", "embedding"]])
def test_nothing_is_kept_where_training_begins_at_the_bottom(targets):
    model, _ = made(targets=targets)
    assert found(model) == ([], "what is trained begins at the bottom of the model")


class Tapped(Model):
    """The head reads what the last block was given, as a classifier's hook has it; all of the body is frozen."""

    def __init__(self):
        super().__init__(Deep())
        self.body.requires_grad_(False).blocks[2].register_forward_pre_hook(self.note)

    def note(self, module, args):
        self.seen.append(args[0])

    def forward(self, batch):
        self.seen = []
        self.body(batch)
        (h,) = self.seen
        mask = batch["mask"][:, :, None]
        return self.head((h * mask).sum(1) / mask.sum(1))


def test_where_skipping_the_whole_breaks_the_model_its_parts_are_skipped():
    units, why = found(Tapped())
    assert (kept(units), why) == (["body.blocks.1"], "")
    assert [unit.path for unit in units] == ["body.embedding", "body.blocks.0", "body.blocks.1", "body.blocks.2"]


class LeavesBehind(Block):
    def forward(self, h, mask):
        h = super().forward(h, mask)
        self.up.left = h.detach()
        return h


class ReadsBehind(Deep):
    def __init__(self):
        super().__init__(LeavesBehind)

    def forward(self, batch):
        return super().forward(batch) + self.blocks[0].up.left.sum(1)


def test_what_passes_beside_the_outputs_is_found_and_refused():
    units, why = found(made(ReadsBehind)[0])
    assert units == []
    assert why.startswith("replayed, ")


def test_a_body_that_draws_while_it_trains_is_refused():
    class Drops(Block):
        def forward(self, h, mask):
            return super().forward(F.dropout(h, 0.5, self.training), mask)

    model, _ = made(lambda: Deep(Drops))
    assert found(model)[0]  # TaskModel keeps the body in eval()
    model.train = lambda mode=True: nn.Module.train(model, mode)
    units, why = found(model)
    assert units == []
    assert why.startswith("replayed, its ")


def test_rows_that_are_another_each_time_are_not_kept():
    class Disturbed(Means):
        def augment(self, batch):
            return {**batch, "digits": (batch["digits"] + torch.randint(2, batch["digits"].shape)) % 10}

    units, why = found(made()[0], Disturbed())
    assert (units, why) == ([], "training rows are disturbed at random, another way each time")


def test_a_handful_of_rows_is_not_worth_it():
    assert found(made()[0], examples=rows(4)) == ([], "there are only 4 training rows")


def test_looking_changes_nothing_in_the_model():
    model, _ = made(dropout=0.5)
    before, state = copy.deepcopy(dict(model.named_parameters())), torch.get_rng_state()
    classes, attributes = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    found(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for name, m in model.named_modules() if "smidgen" not in name)


def test_an_exception_leaves_no_forward_behind():
    model, _ = made()
    units, _ = found(model)
    examples = rows(22)
    replay = replay_of(model, units, train=examples)
    replay.fill("train", Means(), ACCELERATOR, 8)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with pytest.raises(KeyboardInterrupt), mode, replay.rows(examples, [0, 1]):
            raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_forward_that_others_had_put_there_is_put_back():
    model, _ = made()
    block = model.body.blocks[0]
    own, block.forward = block.forward, lambda h, mask: own(h, mask) * 2
    theirs = block.forward
    units, _ = found(model)
    assert kept(units) == ["body.blocks.1"]
    assert block.__dict__["forward"] is theirs


class TwoTexts(Means):
    """Each row is two texts, which go through the model as rows of one batch, as `embeddings` has them."""

    def collate(self, examples, indices):
        one, other = (super(TwoTexts, self).collate(examples, some) for some in (indices, indices))
        other["digits"] = (other["digits"] + 3) % 10
        return {
            "digits": torch.cat([one["digits"], other["digits"]]),
            "mask": torch.cat([one["mask"], other["mask"]]),
            "targets": one["targets"],
        }

    def loss(self, outputs, batch):
        one, other = outputs.chunk(2)
        return super().loss(one - other, batch)


def test_rows_of_several_texts_are_kept_with_all_of_them():
    model, _ = made()
    units, why = found(model, TwoTexts())
    assert (kept(units), why) == (["body.blocks.1"], "")
    assert {unit.sides for unit in units} == {2}


class Twice(Deep):
    """Runs its blocks on the digits and on their mirror image."""

    def forward(self, batch):
        mirrored = {**batch, "digits": 9 - batch["digits"]}
        return super().forward(batch) * super().forward(mirrored)


def test_a_module_that_is_called_twice_gives_what_each_call_gave():
    model, _ = made(Twice)
    units, why = found(model)
    assert (sorted((unit.path, unit.call) for unit in units if unit.read), why) == (
        [("body.blocks.1", 0), ("body.blocks.1", 1)],
        "",
    )


# -- in the loop


def loop(folder=None, *, kept_in=None, replayed=True, dtype=None, **settings):
    model, adapters = made(dropout=0.3)
    train, valid = rows(22), rows(20, seed=1)
    replay = None
    if replayed:
        sets = {"train": train, "valid": valid}
        sizes = {name: len(examples) for name, examples in sets.items()}
        units, _ = found(model)
        replay = Replay(model, units, Store(sizes, limit_bytes=WIDE, folder=kept_in, dtype=dtype), sets)
        replay.fill("train", Means(), ACCELERATOR, 8)
    usual = {"steps": 12, "batch": 4, "evaluate_every": 4, "save_every": 1, "patience": None, "seed": 0}
    trained = {**dict(adapters.named_parameters()), **{f"head.{n}": p for n, p in model.head.named_parameters()}}
    groups = [Group(parameters=trained, learning_rate=0.02, weight_decay=0.01)]
    chosen = Settings(**{**usual, "fingerprint": "toy", **settings})
    return Loop(model, Means(), groups, train, valid, chosen, ACCELERATOR, folder, replay)


def test_a_replayed_run_learns_what_the_same_run_without_learns():
    with_it, without = loop(), loop(replayed=False)
    for run in (with_it, without):
        run.run(At())
    for curve, points in without.history["curves"].items():
        assert [value for _, value in with_it.history["curves"][curve]] == pytest.approx(
            [value for _, value in points], abs=1e-5
        )
    for name, tensor in without.trained.items():
        torch.testing.assert_close(with_it.trained[name], tensor, rtol=0, atol=1e-4)


def test_evaluations_replay_to_the_bit_because_their_batches_are_always_the_same():
    run = loop()
    answers = [predict(run.model, Means(), run.valid_set, ACCELERATOR, 8, replay=run.replay).answers for _ in range(2)]
    plain = predict(run.model, Means(), run.valid_set, ACCELERATOR, 8).answers
    assert run.replay.store.is_whole("valid")
    assert torch.equal(answers[0], plain)
    assert torch.equal(answers[1], plain)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path, place, dtype):
    def where(name):
        return tmp_path / name if place == "disk" else None

    unbroken = loop(tmp_path / "unbroken", kept_in=where("a"), dtype=dtype, accumulate=2, steps=20)
    expected = unbroken.run(At())
    moments = random.Random(0)
    for number in range(3):
        folder = tmp_path / f"stopped-{number}"
        for stop in [*sorted(moments.sample(range(1, 20), 2)), None]:
            run = loop(folder, kept_in=where(f"b{number}"), dtype=dtype, accumulate=2, steps=20)
            state = checkpoint.newest(folder)
            if state is not None:
                run.resume(state[1])
            outcome = run.run(At([] if stop is None else [stop]))
        assert digest(run) == digest(unbroken)
        assert outcome.curves == expected.curves


def test_what_does_not_fit_is_computed():
    model, _ = made()
    units, _ = found(model)
    examples = rows(22)
    replay = Replay(model, units, Store({"train": 22}, limit_bytes=200), {"train": examples})
    replay.fill("train", Means(), ACCELERATOR, 8)
    assert not replay.store.takes("train")
    batch = Means().collate(examples, [0, 1])
    with replay.rows(examples, [0, 1]):
        assert torch.equal(model(batch), model(batch))


def test_rows_of_other_examples_are_computed():
    model, _ = made()
    units, _ = found(model)
    train, other = rows(22), rows(22, seed=5)
    replay = replay_of(model, units, train=train)
    replay.fill("train", Means(), ACCELERATOR, 8)
    batch = Means().collate(other, [0, 1])
    expected = model(batch)
    with replay.rows(other, [0, 1]):
        assert torch.equal(model(batch), expected)


def test_examples_are_told_apart_by_identity_and_not_by_their_numbers():
    train = rows(22)
    assert isinstance(train.select(range(22)), Examples)
    model, _ = made()
    replay = replay_of(model, found(model)[0], train=train)
    with torch.no_grad(), replay.rows(train.select(range(22)), [0, 1]):
        model(Means().collate(train, [0, 1]))
    assert not replay.store.has("train", [0])
