"""The numbers of a run: the plan carried out on this recipe, this data and this machine."""

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..auto.plan import (
    DEFAULT_MINUTES_ON_CPU,
    Plan,
    choose_precision,
    choose_products,
    choose_steps,
    evaluation_interval,
    fastest,
    shorter_length,
)
from ..auto.presets import Preset, preset
from ..core.products import Library
from ..core.recompute import Level, Offload
from ..data.batches import LengthBucketedBatches
from ..tasks.base import Batch, on_device
from ..training.memory import rows_at_once
from ..training.optim import Optimizer
from ..training.replay import Replay
from ..training.replay_cut import Unit
from ..training.replay_store import Store
from .prepare import Work
from .schema import MethodPart, Recipe, TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_PRESET = "the preset of "
_TRIAL_BATCHES = 4  # that a parameter may wait for its gradient
_TRIAL = range(8)  # rows of the trial that measures the machine
_SAMPLE = 50_000  # rows whose lengths tell those of all


@dataclass
class Chosen:
    """The plan in numbers: everything that the training needs and that a resumed run must find as it was."""

    precision: str
    batch: int
    accumulate: int
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    clip: float
    patience: int
    epochs: float
    minutes: float | None
    max_length: int | None  # None: rows have no length
    seed: int
    shard: bool = False
    products: Library = "usual"  # who multiplies with frozen weights
    lora_plus: float | None = None
    replay: str = "off"
    replay_dtype: str = ""  # what is kept is rounded to it; "" keeps it as computed
    optimizer: Optimizer = "adamw"
    recompute: Level = "off"
    compile: bool = False  # blocks
    offload: Offload = "off"
    split: int = 1  # in how many parts a batch is run, where it does not fit in memory
    steps: int = 0
    evaluate_every: int = 0
    save_every: int = 0

    @property
    def rows(self) -> int:
        """Rows that are trained on at once."""
        return rows_at_once(self.batch, self.split)


def method_of(recipe: Recipe, work: Work, plan: Plan) -> tuple[MethodPart, Preset]:
    """The method with what was said and, for the rest, what the task wants or its preset has; and its rates here."""
    part, task = recipe.method_part, work.task
    rates, said, (wanted, why) = preset(part.name), part.settings, task.method_settings(part.name, work.model)
    plan.decide("method", recipe.method and part.name, part.name, task.default_method[1])
    for field, value in {**rates.settings, **wanted, **said}.items():
        plan.decide(field, said.get(field), value, why if field in wanted else _PRESET + part.name)
    if (factor := task.rate_factor(part.name)) != 1:
        why = f"{factor:g} times the preset's, for this task"
        rates = dataclasses.replace(rates, learning_rate=factor * rates.learning_rate, why=why)
    return MethodPart(name=part.name, **{**rates.settings, **wanted, **said}), rates


def choose(said: TrainPart, rates: Preset, work: Work, plan: Plan, seed: int) -> Chosen:
    """Everything but the number of steps, which needs a measurement."""
    device = work.asked.device
    rows = len(work.train)
    most = work.task.largest_batch
    fitting = min(most, 32 if rows >= 4000 else 16 if rows >= 200 else 8) if most <= 32 else min(most, rows)
    batch = plan.decide(
        "batch", said.batch, fitting, f"at most {most}: adapters learn worse from larger ones; fewer for few rows"
    )
    measured: tuple[str, str, float | None] = (said.precision or "", "", None)
    if said.precision is None:
        measured = agreed(choose_precision(lambda p: _trial(work, p), device))
    precision, why, seconds = measured
    plan.decide("precision", said.precision, precision, why)
    default = DEFAULT_MINUTES_ON_CPU if device.type == "cpu" and said.epochs is None and said.steps is None else None
    why = "a first answer soon; more with --minutes or --epochs" if default else "no limit"
    minutes = plan.decide("minutes", said.minutes, default, why)
    if minutes is not None and seconds is not None and "max_length" not in work.recipe.task.settings:
        _shorten(work, plan, seconds, minutes)
    return Chosen(
        precision=precision,
        batch=batch,
        accumulate=plan.decide("accumulate", said.accumulate, 1, "a batch fits"),
        learning_rate=plan.decide("learning_rate", said.learning_rate, rates.learning_rate, rates.why),
        head_learning_rate=_head_rate(said, rates, work, plan),
        weight_decay=plan.decide(
            "weight_decay", said.weight_decay, rates.weight_decay, "a little, against overfitting"
        ),
        warmup=plan.decide("warmup", said.warmup, 0.06, "share of the steps"),
        label_smoothing=plan.decide(
            "label_smoothing", said.label_smoothing, 0.0, "none: it cost accuracy or brought nothing"
        ),
        clip=plan.decide("clip", said.clip, 1.0, "of the gradient's norm"),
        patience=plan.decide(
            "patience", said.patience, work.task.patience, "evaluations without a better metric or a lower loss"
        ),
        epochs=plan.decide("epochs", said.epochs, work.task.epochs_factor * rates.epochs, "at most"),
        minutes=minutes,
        max_length=work.task.max_length,
        seed=seed,
        shard=bool(said.shard),
        products=_products(said, work, plan, precision),
        lora_plus=said.lora_plus and plan.decide("lora_plus", said.lora_plus, said.lora_plus, ""),
        optimizer=plan.decide("optimizer", said.optimizer, said.optimizer, "") if said.optimizer else "adamw",
        offload=plan.decide("offload", said.offload, said.offload, "") if said.offload else "off",
        compile=bool(said.compile and plan.decide("compile", said.compile, True, "")),
    )


def _head_rate(said: TrainPart, rates: Preset, work: Work, plan: Plan) -> float:
    """The learning rate of what the task adds; nothing is said of it where it adds nothing."""
    if not any(True for _ in work.model.head.parameters()):
        return rates.head_learning_rate
    why = "the head starts from the linear probe" if work.task.probed else "the preset's"
    factor = work.task.head_rate_factor
    if factor != 1:
        why += f"; {factor:g} times the preset's, for this task"
    return plan.decide("head_learning_rate", said.head_learning_rate, factor * rates.head_learning_rate, why)


def _products(said: TrainPart, work: Work, plan: Plan, precision: str) -> Library:
    """Who multiplies with frozen weights in fp32 on a processor, by a measurement on the largest linear layer."""
    if said.products is not None:
        return plan.decide("products", said.products, said.products, "")
    layers = [m for m in work.model.body.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.float32]
    if work.asked.device.type != "cpu" or precision != "fp32" or not layers:
        return "usual"
    largest = max(layers, key=lambda layer: layer.weight.numel())
    rows = len(_TRIAL) * max(work.train.lengths[i] for i in _trial_rows(work))
    library, faster = agreed(choose_products(min(rows, 512), largest.in_features, largest.out_features))
    if library == "onednn":
        plan.decide("products", None, "onednn", f"measured {faster:.1f} times as fast as the usual library here")
    return library


def choose_steps_for(
    said: TrainPart, chosen: Chosen, work: Work, accelerator: "Accelerator", plan: Plan, speed: "Speed", spent_s: float
) -> None:
    """Choose how many training steps there will be.   speed: of this model, `measure`d."""
    per_step = chosen.batch * chosen.accumulate * accelerator.num_processes
    _say_padding(work, chosen, accelerator.num_processes, plan)
    left = None
    if chosen.minutes is not None:
        rows = len(work.test) + sum(map(len, work.shift.values())) + 8 * len(work.valid)
        left = 60 * chosen.minutes - spent_s - speed.forward * rows
    steps, why = choose_steps(
        said=said.steps,
        rows=len(work.train),
        per_step=per_step,
        epochs=chosen.epochs,
        seconds_per_step=speed.step,
        seconds_left=left,
    )
    chosen.steps = plan.decide("steps", said.steps if said.steps == steps else None, steps, why)
    every = evaluation_interval(chosen.steps)
    chosen.evaluate_every = plan.decide("evaluate_every", said.evaluate_every, every, "about eight times in the run")
    chosen.save_every = plan.decide("save_every", said.save_every, every, "with every evaluation")


def _say_padding(work: Work, chosen: Chosen, processes: int, plan: Plan) -> None:
    """Enter in the plan how much of an epoch is padding; of many rows, how much it is of some drawn at random."""
    lengths = work.train.lengths
    if len(set(lengths)) < 2:
        return
    if len(lengths) > _SAMPLE:
        lengths = random.Random(chosen.seed).sample(lengths, _SAMPLE)
    batches = LengthBucketedBatches(lengths, batch_size=chosen.batch, seed=chosen.seed, world=processes)
    bucketed, at_random = batches.padding_share()
    plan.decide(
        "padding",
        None,
        f"{bucketed:.1%} of the {work.task.unit}",
        f"rows of like length share a batch; in batches drawn at random it would be {at_random:.1%}",
    )


def trial_batches(work: Work, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
    """The batch of the longest training rows (what goes there goes everywhere), and a few others."""
    longest = LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed, shuffle=False)
    others = LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed)
    for indices in itertools.islice(itertools.chain(itertools.islice(longest, 1), others), _TRIAL_BATCHES):
        yield on_device(work.task.collate(work.train, indices), device)


def agreed(value: T) -> T:
    """The main process's value on all: what each measures for itself would differ."""
    from accelerate.utils import broadcast_object_list

    return cast(T, broadcast_object_list([value])[0])


def _shorten(work: Work, plan: Plan, seconds: float, minutes: float) -> None:
    """Cut texts shorter where not even one epoch of them would fit the time."""
    if work.task.max_length is None or not work.task.may_shorten:
        return
    per_token = seconds / (len(_TRIAL) * max(work.train.lengths[i] for i in _trial_rows(work)))
    length = shorter_length(work.task.max_length, sum(work.train.lengths), per_token, minutes)
    if length < work.task.max_length:
        why = f"at {work.task.max_length} not one epoch fits the time; seeing all rows is worth more"
        plan.replace("max_length", length, why)
        work.cut(length)


def _trial_rows(work: Work) -> list[int]:
    return [i % len(work.train) for i in _TRIAL]


def _trial(work: Work, precision: str) -> None:
    """One forward and backward through the frozen model, to see what it costs.

    The gradient goes down to the first module that gives numbers, as it does with adapters in the lowest layer.
    """
    batch = work.task.collate(work.train, _trial_rows(work))
    zeros: list[Tensor] = []

    def add_zero(module: nn.Module, args: Any, output: Any) -> Any:
        if zeros or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        zeros.append(torch.zeros((), requires_grad=True))
        return output + zeros[0].to(output)

    hooks = [module.register_forward_hook(add_zero) for module in work.model.body.modules()]
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = work.task.loss(work.model(batch), batch)
    finally:
        for handle in hooks:
            handle.remove()
    torch.autograd.grad(loss, zeros, allow_unused=True)


@dataclass(frozen=True)
class Speed:
    """Seconds of a training step in one process, and of a row that is judged."""

    step: float
    forward: float


def measure(work: Work, chosen: Chosen, accelerator: "Accelerator") -> Speed:
    """How long a few of the first batches take."""
    batches = _first_batches(work, chosen, 4)
    spent = [0.0, 0.0]
    tokens = 0
    work.model.train()
    for number, indices in enumerate(batches):
        batch = on_device(work.task.collate(work.train, indices), accelerator.device)
        for backward in (True, False):
            start = time.monotonic()
            _pass(work, batch, accelerator, backward=backward)
            if number or len(batches) == 1:  # the first warms up
                spent[not backward] += time.monotonic() - start
        if number or len(batches) == 1:
            tokens += sum(work.train.lengths[i] for i in indices)
    work.model.zero_grad()
    per_row = [seconds / tokens * statistics.fmean(work.train.lengths) for seconds in spent]
    return Speed(per_row[0] * chosen.batch * chosen.accumulate, per_row[1])


def measure_replay(work: Work, chosen: Chosen, accelerator: "Accelerator", plain: Speed, units: list[Unit]) -> Speed:
    """The speed where these units are replayed, by what it gains on one batch."""
    (indices,) = _first_batches(work, chosen, 1)
    batch = on_device(work.task.collate(work.train, indices), accelerator.device)
    store = Store({"train": len(work.train)}, limit_bytes=1 << 40)
    replay = Replay(work.model, units, store, {"train": work.train})
    with torch.no_grad(), replay.rows(work.train, indices):
        _pass(work, batch, accelerator, backward=False)  # records

    def run(backward: bool, replayed: bool) -> None:
        with replay.rows(work.train, indices) if replayed else nullcontext():
            _pass(work, batch, accelerator, backward=backward)

    work.model.train()
    gains = []
    for backward in (True, False):
        before, after = fastest(partial(run, backward, False), partial(run, backward, True))
        gains.append(after / before)
    work.model.zero_grad()
    return Speed(gains[0] * plain.step, gains[1] * plain.forward)


def _first_batches(work: Work, chosen: Chosen, count: int) -> list[list[int]]:
    batches = LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed)
    return list(itertools.islice(batches, count))


def _pass(work: Work, batch: Batch, accelerator: "Accelerator", *, backward: bool) -> None:
    with accelerator.autocast(), torch.set_grad_enabled(backward):
        loss, _ = work.task.loss(work.model(batch), batch)
    if backward:
        loss.backward()  # type: ignore[no-untyped-call]
