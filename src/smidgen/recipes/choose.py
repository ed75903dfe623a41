"""The numbers of a run: the plan carried out on this recipe, this data and this machine."""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..auto.plan import (
    DEFAULT_MINUTES_ON_CPU,
    Plan,
    choose_precision,
    choose_steps,
    evaluation_interval,
    shorter_length,
)
from ..auto.presets import Preset, preset
from ..core.method import Method
from ..core.recompute import Level, Offload
from ..data.batches import LengthBucketedBatches
from ..tasks.base import Batch
from ..training.memory import rows_at_once
from ..training.optim import Optimizer
from .prepare import Work
from .schema import MethodPart, Recipe, TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_TRIAL_BATCHES = 4  # that a parameter may wait for its gradient
_TRIAL = range(8)  # rows of the trial that measures the machine


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
    lora_plus: float | None = None
    optimizer: Optimizer = "adamw"
    recompute: Level = "off"
    offload: Offload = "off"
    split: int = 1  # in how many parts a batch is run, where it does not fit in memory
    steps: int = 0
    evaluate_every: int = 0
    save_every: int = 0

    @property
    def rows(self) -> int:
        """Rows that are trained on at once."""
        return rows_at_once(self.batch, self.split)


def method_of(recipe: Recipe, plan: Plan) -> tuple[Method, Preset]:
    """The method with what was said and, for the rest, its preset."""
    said = recipe.method.settings if recipe.method else {}
    name = recipe.method.name if recipe.method else "lora"
    rates = preset(name)
    plan.decide("method", recipe.method and name, name, "the best known quality for its cost, and it merges")
    for field, value in {**rates.settings, **said}.items():
        plan.decide(field, said.get(field), value, f"the preset of {name}")
    return MethodPart(name=name, **{**rates.settings, **said}).build(), rates


def choose(said: TrainPart, rates: Preset, work: Work, plan: Plan, seed: int) -> Chosen:
    """Everything but the number of steps, which needs a measurement."""
    device = next(work.model.parameters()).device
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
    rate, why_rate = rates.learning_rate, rates.why
    if work.task.rate_factor != 1:
        rate, why_rate = rate * work.task.rate_factor, f"{work.task.rate_factor:g} times the preset's, for this task"
    return Chosen(
        precision=precision,
        batch=batch,
        accumulate=plan.decide("accumulate", said.accumulate, 1, "a batch fits"),
        learning_rate=plan.decide("learning_rate", said.learning_rate, rate, why_rate),
        head_learning_rate=_head_rate(said, rates, work, plan),
        weight_decay=plan.decide(
            "weight_decay", said.weight_decay, rates.weight_decay, "a little, against overfitting"
        ),
        warmup=plan.decide("warmup", said.warmup, 0.06, "share of the steps"),
        label_smoothing=plan.decide(
            "label_smoothing", said.label_smoothing, 0.0, "none: it cost accuracy or brought nothing"
        ),
        clip=plan.decide("clip", said.clip, 1.0, "of the gradient's norm"),
        patience=plan.decide("patience", said.patience, 5, "evaluations without a better metric or a lower loss"),
        epochs=plan.decide("epochs", said.epochs, rates.epochs, "at most"),
        minutes=minutes,
        max_length=work.task.max_length,
        seed=seed,
        lora_plus=said.lora_plus and plan.decide("lora_plus", said.lora_plus, said.lora_plus, ""),
        optimizer=plan.decide("optimizer", said.optimizer, said.optimizer, "") if said.optimizer else "adamw",
        offload=plan.decide("offload", said.offload, said.offload, "") if said.offload else "off",
    )


def _head_rate(said: TrainPart, rates: Preset, work: Work, plan: Plan) -> float:
    """The learning rate of what the task adds; nothing is said of it where it adds nothing."""
    if not any(True for _ in work.model.head.parameters()):
        return rates.head_learning_rate
    why = "the head starts from the linear probe" if work.task.probed else rates.why
    factor = work.task.head_rate_factor
    if factor != 1:
        why += f"; {factor:g} times the preset's, for this task"
    return plan.decide("head_learning_rate", said.head_learning_rate, factor * rates.head_learning_rate, why)


def choose_steps_for(
    said: TrainPart, chosen: Chosen, work: Work, accelerator: "Accelerator", plan: Plan, spent_s: float
) -> None:
    """Measure a few training steps and choose how many there will be."""
    world = accelerator.num_processes
    per_step = chosen.batch * chosen.accumulate * world
    per_token, per_token_forward = _measure(work, chosen, accelerator)
    tokens = statistics.fmean(work.train.lengths)
    seconds_per_step = per_token * tokens * chosen.batch * chosen.accumulate
    left = None
    if chosen.minutes is not None:
        rows = len(work.test) + sum(map(len, work.shift.values())) + 8 * len(work.valid)
        left = 60 * chosen.minutes - spent_s - per_token_forward * tokens * rows
    steps, why = choose_steps(
        said=said.steps,
        rows=len(work.train),
        per_step=per_step,
        epochs=chosen.epochs,
        seconds_per_step=seconds_per_step,
        seconds_left=left,
    )
    chosen.steps = plan.decide("steps", said.steps if said.steps == steps else None, steps, why)
    every = evaluation_interval(chosen.steps)
    chosen.evaluate_every = plan.decide("evaluate_every", said.evaluate_every, every, "about eight times in the run")
    chosen.save_every = plan.decide("save_every", said.save_every, every, "with every evaluation")


def trial_batches(work: Work, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
    """The batch of the longest training rows (what goes there goes everywhere), and a few others."""
    longest = LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed, shuffle=False)
    others = LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed)
    for indices in itertools.islice(itertools.chain(itertools.islice(longest, 1), others), _TRIAL_BATCHES):
        yield {name: value.to(device) for name, value in work.task.collate(work.train, indices).items()}


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


def _measure(work: Work, chosen: Chosen, accelerator: "Accelerator") -> tuple[float, float]:
    """Seconds per token of a training step, and of a forward pass, on a few of the first batches."""
    batches = [
        indices
        for indices, _ in zip(
            LengthBucketedBatches(work.train.lengths, batch_size=chosen.rows, seed=chosen.seed), range(4), strict=False
        )
    ]
    spent = [0.0, 0.0]
    tokens = 0
    work.model.train()
    for number, indices in enumerate(batches):
        batch = {name: value.to(accelerator.device) for name, value in work.task.collate(work.train, indices).items()}
        for backward in (True, False):
            start = time.monotonic()
            with accelerator.autocast(), torch.set_grad_enabled(backward):
                loss, _ = work.task.loss(work.model(batch), batch)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
            if number or len(batches) == 1:  # the first warms up
                spent[not backward] += time.monotonic() - start
        if number or len(batches) == 1:
            tokens += sum(work.train.lengths[i] for i in indices)
    work.model.zero_grad()
    return spent[0] / tokens, spent[1] / tokens
