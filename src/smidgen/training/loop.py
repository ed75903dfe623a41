"""The training loop: steps, evaluation, early stopping, checkpoints.  Everything a step does follows from (seed, step).

The gradient of a step is that of the mean loss over all that counts in it, however it is split into micro-batches and
processes: losses are summed, and the gradients divided once by the true count.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..adapters import adapters_of
from ..core.adapter import HELD
from ..core.recompute import Level, Offload, recompute
from ..data.batches import LengthBucketedBatches
from ..tasks.base import Batch, Examples, Task, on_device
from . import checkpoint
from .compiling import as_written, blocks_beside, compiled
from .distributed import same_everywhere, sum_gradients
from .guard import Guard, Stopper
from .memory import fitting, rows_at_once
from .optim import Group, Optimizer, optimizer_of
from .progress import Progress
from .replay import Replay, replayed

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_POINTS = 100  # of the training-loss curve


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.   batch: rows per micro-batch and process; a step sees batch x accumulate x processes.

    split: in how many parts each micro-batch is run, where it does not fit in memory as a whole.
    recompute, offload: what blocks keep for backward, and where (`core/recompute.py`).   compile: them, while training.
    warmup: share of the steps over which the learning rate rises; it then falls in a line to zero.
    patience: evaluations without a better metric or a lower loss before stopping; None trains to the end.
    fingerprint: of recipe, data and model; a checkpoint with another is refused.
    """

    steps: int
    batch: int
    accumulate: int = 1
    split: int = 1
    recompute: Level = "off"
    compile: bool = False
    offload: Offload = "off"
    optimizer: Optimizer = "adamw"
    warmup: float = 0.06
    clip: float = 1.0
    evaluate_every: int
    save_every: int
    patience: int | None
    seed: int
    fingerprint: str


@dataclass
class Outcome:
    """What training came to; the best tensors are in the model."""

    stopped: Literal["finished", "early", "interrupted"]
    step: int
    best_step: int
    best_value: float
    seconds: float
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    split: int = 1  # in how many parts each micro-batch ran at the end


class Loop:
    """One run of one model: adapters, or all its weights."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        groups: Sequence[Group],
        train: Examples,
        valid: Examples,
        settings: Settings,
        accelerator: "Accelerator",
        folder: Path | None,
        replay: Replay | None = None,
    ) -> None:
        """folder: where checkpoints go; None keeps the best state in memory alone.   replay: of the frozen part."""
        self.model, self.task, self.train_set, self.valid_set = model, task, train, valid
        self.settings, self.accelerator, self.folder, self.replay = settings, accelerator, folder, replay
        self.trained = {name: p for group in groups for name, p in group.parameters.items()}
        self.buffers = {n: b for n, b in model.named_buffers() if HELD in n.split(".")}  # masks, statistics
        self.kept: dict[str, Tensor] = {**self.trained, **self.buffers}
        self.optimizer = optimizer_of(groups, settings.optimizer)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.history: dict[str, Any] = {
            "curves": {},
            "losses": [],  # since the curve's last point
            "best_step": None,
            "best_value": None,
            "best_rank": None,  # metric and loss, the better the larger
            "lowest_loss": None,
            "worse": 0,  # evaluations since metric or loss was better than ever before
            "seconds": 0.0,
            "split": settings.split,
        }
        self.best: dict[str, Tensor] = {}
        self.step = 0

    def resume(self, state: checkpoint.State) -> None:
        """Continue from a checkpoint of this run."""
        self._load(state.tensors)
        self.optimizer.load_state_dict(state.optimizer)
        self.step, self.history = state.step, dict(state.history)
        self.best = self.history.pop("best", state.tensors)

    def run(self, progress: Progress) -> Outcome:
        """Train to the end, until patience is over, or until somebody asks to stop."""
        settings, guard = self.settings, Guard(self.model.named_parameters())
        self.model.train()
        if self.accelerator.num_processes > 1:
            same_everywhere(self.kept.values())
        for adapters in filter(None, map(adapters_of, self.model.modules())):
            adapters.follow(self.optimizer, settings.steps, done=self.step)
        started, before = time.monotonic(), self.history["seconds"]
        batches = self._batches()
        replayed_paths = [unit.path for unit in self.replay.units] if self.replay else []
        paths = blocks_beside(self.model, replayed_paths) if settings.compile else []
        with (
            Stopper() as stopper,
            recompute(self.model, settings.recompute, offload=settings.offload),
            compiled(self.model, paths),
        ):
            if self.history["best_step"] is None:
                self._evaluate(progress)  # the start counts: a run that only makes it worse ends where it began
                self._save()
            interrupted = self._any(stopper.requested is not None)
            while not (interrupted or self._is_over()):
                rows = [next(batches) for _ in range(settings.accumulate)]
                loss, tokens = self._fitting(partial(self._step, guard, rows))
                self.step += 1
                self._note(loss)
                progress.step(self.step, loss, tokens)
                judged = self.step == settings.steps or self.step % settings.evaluate_every == 0
                if judged:
                    guard.check_parameters(self.step)
                    self._evaluate(progress)
                self.history["seconds"] = before + time.monotonic() - started
                interrupted = self._any(stopper.requested is not None)
                if judged or interrupted or self.step % settings.save_every == 0:
                    guard.check_parameters(self.step)
                    self._save()
        over = self._is_over()
        if over:
            self._load(self.best)
        return Outcome(
            stopped="interrupted" if not over else "finished" if self.step == settings.steps else "early",
            step=self.step,
            best_step=self.history["best_step"],
            best_value=self.history["best_value"],
            seconds=before + time.monotonic() - started,
            curves={name: [(int(s), float(v)) for s, v in points] for name, points in self.history["curves"].items()},
            split=self.history["split"],
        )

    def _is_over(self) -> bool:
        """True if all steps are done, or patience is; of a resumed run too."""
        patience = self.settings.patience
        return self.step >= self.settings.steps or (patience is not None and self.history["worse"] >= patience)

    def _fitting(self, run: Callable[[], T]) -> T:
        """run(); where memory does not suffice, again with every batch in twice as many parts."""

        def at(split: int) -> T:
            self.history["split"] = split
            return run()

        result, _ = fitting(at, self.settings.batch, self.history["split"], alone=self.accelerator.num_processes == 1)
        return result

    def _step(self, guard: Guard, micro_batches: list[list[int]]) -> tuple[float, int]:
        """One optimiser step; returns the mean loss and the number of tokens, over all processes."""
        _seed_step(self.settings.seed, self.step, self.accelerator.process_index)
        most = rows_at_once(self.settings.batch, self.history["split"])
        parts = [rows[i : i + most] for rows in micro_batches for i in range(0, len(rows), most)]
        factor = _warmed_linear(self.step, self.settings.steps, self.settings.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad()
        totals = torch.zeros(3, dtype=torch.float64)  # loss, count, tokens
        for indices in parts:
            batch = self.task.augment(on_device(self.task.collate(self.train_set, indices), self.accelerator.device))
            with replayed(self.replay, self.train_set, indices), self.accelerator.autocast():
                loss, count = self.task.loss(self.model(batch), batch)
                guard.check_loss(loss.detach(), self.step + 1)
                self.accelerator.backward(loss)
            totals += torch.tensor([float(loss.detach()), count, sum(self.train_set.lengths[j] for j in indices)])
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(self.accelerator.device), "sum").cpu()
            sum_gradients(self.trained.values())
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / float(totals[1]))
        guard.clip_and_check(self.settings.clip)
        self.optimizer.step()
        return float(totals[0] / totals[1]), int(totals[2])

    def _evaluate(self, progress: Progress) -> None:
        if self.accelerator.num_processes > 1:  # each has statistics of its own rows
            same_everywhere(self.buffers.values())
        judged = self._fitting(self._judge)
        loss, value = judged.loss, self.task.score(judged.answers, self.valid_set.targets)[self.task.metric]
        self._point("valid loss", loss)
        self._point(f"valid {self.task.metric}", value)
        history = self.history
        # by the metric; by the loss where that is the same, as it often is on few rows
        rank = [value if self.task.higher_is_better else -value, -loss]
        is_best = history["best_rank"] is None or rank > history["best_rank"]
        is_lowest = history["lowest_loss"] is None or loss < history["lowest_loss"]
        if is_best:
            history.update(best_step=self.step, best_value=value, best_rank=rank)
            self.best = {name: tensor.detach().clone() for name, tensor in self.kept.items()}
        if is_lowest:
            history["lowest_loss"] = loss
        history["worse"] = 0 if is_best or is_lowest else history["worse"] + 1
        progress.metric = f"valid {self.task.metric} {value:.3f}"

    def _judge(self) -> "Judged":
        rows = rows_at_once(2 * self.settings.batch, self.history["split"])
        with as_written(self.settings.compile):
            return predict(self.model, self.task, self.valid_set, self.accelerator, rows, replay=self.replay)

    def _save(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        is_best = self.history["best_step"] == self.step
        state = checkpoint.State(
            step=self.step,
            tensors={name: tensor.detach() for name, tensor in self.kept.items()},
            optimizer=self.optimizer.state_dict(),
            history=self.history if is_best else {**self.history, "best": self.best},
            fingerprint=self.settings.fingerprint,
        )
        checkpoint.save(self.folder, state)

    @torch.no_grad()
    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.kept[name].copy_(value)

    def _batches(self) -> Iterator[list[int]]:
        """The micro-batches from the current step on, epoch after epoch."""
        settings = self.settings
        source = LengthBucketedBatches(
            self.train_set.lengths,
            batch_size=settings.batch,
            seed=settings.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        epoch, skip = divmod(self.step * settings.accumulate, len(source))
        while True:
            source.set_epoch(epoch)
            yield from list(source)[skip:]
            epoch, skip = epoch + 1, 0

    def _note(self, loss: float) -> None:
        """Keep a step's loss; as many of them as make a point of the curve are averaged."""
        losses = self.history["losses"]
        losses.append(loss)
        if self.step == self.settings.steps or self.step % max(1, self.settings.steps // _POINTS) == 0:
            self._point("train loss", sum(losses) / len(losses))
            losses.clear()

    def _point(self, curve: str, value: float) -> None:
        self.history["curves"].setdefault(curve, []).append([self.step, value])

    def _any(self, flag: bool) -> bool:
        """True on every process if it is on any."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)


@dataclass(frozen=True)
class Judged:
    """What a model says to examples: its answers (N, ...), in their order, on the CPU, and the mean loss."""

    answers: Tensor
    loss: float


def predict(
    model: nn.Module,
    task: Task,
    examples: Examples,
    accelerator: "Accelerator",
    batch: int,
    *,
    labelled: bool = True,
    replay: Replay | None = None,
) -> Judged:
    """The model's answers to all examples, in fp32 where they are no whole numbers; processes share the work.

    labelled: False leaves out the loss, which is then NaN.
    """
    sums = torch.zeros(2, dtype=torch.float64)  # loss, count

    def answers(inputs: Batch) -> Tensor:
        outputs = model(inputs)
        if labelled:
            loss, count = task.loss(outputs, inputs)
            sums.add_(torch.tensor([float(loss), count], dtype=torch.float64))
        return task.answer(outputs, inputs)

    found = over_batches(model, task, examples, accelerator, batch, answers, replay)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    first = found[0][1]
    whole = first.new_zeros(len(examples), *first.shape[1:])
    for indices, part in found:
        whole[indices] = part
    return Judged(whole, float(sums[0] / sums[1]) if sums[1] else math.nan)


@torch.no_grad()
def over_batches(
    model: nn.Module,
    task: Task,
    examples: Examples,
    accelerator: "Accelerator",
    batch: int,
    take: Callable[[Batch], Tensor],
    replay: Replay | None = None,
) -> list[tuple[list[int], Tensor]]:
    """What `take` makes of each batch of this process, with the examples' numbers; the model is in `eval` meanwhile."""
    rank, world = accelerator.process_index, accelerator.num_processes
    order = LengthBucketedBatches(examples.lengths, batch_size=batch, seed=0, shuffle=False, rank=rank, world=world)
    training = model.training
    model.eval()
    found: list[tuple[list[int], Tensor]] = []
    for indices in order:
        inputs = on_device(task.collate(examples, indices), accelerator.device)
        with replayed(replay, examples, indices), accelerator.autocast():
            taken = take(inputs)
        found.append((indices, (taken.float() if taken.is_floating_point() else taken).cpu()))
    model.train(training)
    return found


def _warmed_linear(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate: a line up over the first share of the steps, a line down to
    zero over the rest.
    """
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def _seed_step(seed: int, step: int, rank: int) -> None:
    """All randomness of a step follows from (seed, step, rank): a resumed run draws what the unbroken one would."""
    mixed = (seed * 1_000_003 + step) * 4_096 + rank
    random.seed(mixed)
    torch.manual_seed(mixed % (1 << 63))
