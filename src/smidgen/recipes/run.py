"""One run, from recipe to report: prepare, plan, probe the base, attach, check, train, judge, save.

OUT/               the result, written once and whole: adapter, head, recipe, report.json, report.html, README.md
OUT.checkpoints/   while it is not finished; `--resume` continues from there
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import __version__
from ..adapters import AdapterSet, attach
from ..auto.linear_probe import Loss, Probe, fit_probe
from ..auto.plan import (
    DEFAULT_MINUTES_ON_CPU,
    Plan,
    choose_precision,
    choose_steps,
    evaluation_interval,
    shorter_length,
)
from ..auto.preflight import preflight
from ..auto.presets import Preset, preset
from ..core.errors import CheckpointError, RecipeError
from ..core.files import remove_directory
from ..core.fingerprint import fingerprint
from ..core.method import Method
from ..core.site import Site
from ..core.targets import Targets
from ..data.batches import LengthBucketedBatches
from ..data.split import subset
from ..evaluate.report import Row
from ..evaluate.terminal import show
from ..methods.selective import Selective
from ..tasks.base import Batch
from ..tasks.text_classification import TextClassifier
from ..training import checkpoint
from ..training.loop import Group, Loop, Settings, predict
from ..training.memory import peak_memory
from ..training.progress import Progress
from . import judge
from .prepare import Work, best_device, make_accelerator, prepare, set_threads
from .save import is_result, save_result
from .schema import MethodPart, Recipe, TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console


T = TypeVar("T")
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
    max_length: int
    seed: int
    steps: int = 0
    evaluate_every: int = 0
    save_every: int = 0


def tune(recipe: Recipe, *, resume: bool, fresh: bool, console: "Console") -> Path:
    """Run a recipe; returns the folder of the result.

    resume: continue from the newest whole checkpoint, or start where there is none.   fresh: start anew, replacing.
    Raises SmidgenError subclasses; what was saved before stays.
    """
    started = time.monotonic()
    out = recipe.out or Path("out") / f"{Path(recipe.data.train).stem}-{recipe.method_object().name}"
    if out.name in ("", ".."):
        raise RecipeError(f"--out {out} is no folder of its own; a result is written and replaced as a whole")
    checkpoints = out.with_name(out.name + ".checkpoints")
    device = best_device()
    quiet = not _is_main_process(device)
    if quiet:
        console = _silent()
    if _finished(out, checkpoints, resume=resume, fresh=fresh):
        console.print(f"{out} is finished: nothing to resume", highlight=False)
        return out
    saved = _saved(checkpoints, recipe) if resume else None
    plan = Plan()
    seed = plan.decide("seed", recipe.train.seed, 0, "the same run twice is the same result")
    plan.decide("threads", recipe.train.threads, set_threads(recipe.train.threads), "the cores this process may use")
    console.print(f"[bold]smidgen {__version__}[/bold]  {recipe.model.path}  on  {recipe.data.train}", highlight=False)
    work = prepare(recipe, plan, device, seed)
    method, rates = _method(recipe, plan)
    chosen = _choose(recipe.train, rates, work, plan, seed)
    if saved is not None:
        chosen = Chosen(**saved[1].history["chosen"])  # measured then; measured again it might differ
        if chosen.max_length != work.task.max_length:
            work.cut(chosen.max_length)
    work.task.label_smoothing = chosen.label_smoothing
    accelerator = make_accelerator(device, chosen.precision)

    base = _probe(work, chosen, accelerator)
    base.start(work.model)
    adapters = _attach(method, work, chosen, plan)
    trained = {**_named(adapters), **_head(work.model)}
    parameters = sum(p.numel() for p in trained.values())
    share = f"{parameters / work.total_parameters:.2%} of the model's {work.total_parameters:,}"
    plan.decide("trained", None, f"{parameters:,} parameters", share)
    checks = preflight(work.model, adapters, trained, work.task, _first_batch(work, chosen, device))
    if saved is None:
        _choose_steps(recipe.train, chosen, work, accelerator, plan, time.monotonic() - started)
        chosen = _agreed(chosen)
    else:
        plan.entries = [(name, value, why) for name, value, why in saved[1].history["plan"]]
    _show_plan(plan, checks, console)
    if recipe.dry_run:
        console.print("Dry run: everything is checked, nothing was trained.")
        return out

    loop = Loop(
        work.model,
        work.task,
        _groups(adapters, work.model, chosen),
        work.train,
        work.valid,
        _settings(chosen, _fingerprint(work)),
        accelerator,
        checkpoints,
    )
    loop.history |= {"chosen": dataclasses.asdict(chosen), "said": _said(recipe), "plan": plan.entries}
    if saved is not None:
        _continue(loop, saved, console)
    elif fresh and checkpoints.exists() and not quiet:
        remove_directory(checkpoints)
    with peak_memory(device) as peak, Progress(None if quiet else console, "tuning", chosen.steps, loop.step) as bar:
        outcome = loop.run(bar)
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt(
            f"stopped at step {outcome.step} of {chosen.steps}; all is saved, continue with --resume"
        )
    tuned = _answers(work, chosen, accelerator)
    rows = [
        judge.majority(work),
        judge.row(
            "base",
            work,
            base.answers.test,
            trainable=base.size,
            peak_bytes=base.peak_bytes,
            seconds=base.seconds,
            disk_bytes=4 * base.size,
        ),
        judge.row(
            "tuned",
            work,
            tuned.test,
            trainable=parameters,
            peak_bytes=peak.size_bytes,
            seconds=outcome.seconds,
            disk_bytes=0,
        ),  # known once it is written
    ]
    if "full" in recipe.report.against:
        rows.append(_full(work, chosen, base, accelerator, console if not quiet else None))
    if quiet:
        return out
    notes = [*work.data.notes, *base.notes]
    report = judge.report(work, rows, base.answers, tuned, outcome, plan, method.name, notes, _versions())
    resolved = recipe.model_copy(update={"out": out})
    report = save_result(out, work, adapters, report, resolved, replace=fresh or resume)
    if checkpoints.exists():
        remove_directory(checkpoints)
    show(report, console)
    console.print(
        f"\nSaved in {out} after {time.monotonic() - started:.0f} s. Look: {out / 'report.html'}", highlight=False
    )
    return out


@dataclass(frozen=True)
class Base:
    """The linear probe: the frozen model's answers, and where the tuned head starts."""

    probe: Probe
    answers: judge.Answers
    size: int
    peak_bytes: int | None
    seconds: float
    notes: list[str]

    @torch.no_grad()
    def start(self, model: TextClassifier) -> None:
        """Let the head start where the probe ends."""
        model.head.weight.copy_(self.probe.weight)
        model.head.bias.copy_(self.probe.bias)


def _probe(work: Work, chosen: Chosen, accelerator: "Accelerator") -> Base:
    """Fit the probe on the frozen model's features of the training rows, and judge it on the test rows."""
    started = time.monotonic()
    model = _Features(work.model)
    rows = list(range(len(work.train)))
    notes: list[str] = []
    with peak_memory(accelerator.device) as peak:
        if chosen.minutes is not None:
            rows = _affordable(model, work, chosen, accelerator)
            if len(rows) < len(work.train):
                notes.append(
                    f"The linear probe was fitted on {len(rows):,} of {len(work.train):,} training "
                    "rows, what a third of the time allows."
                )
        some = work.train.select(rows)
        features = predict(model, work.task, some, accelerator, 2 * chosen.batch)
        probe = fit_probe(features, some.targets, work.task.outputs, _mean_loss(work), seed=chosen.seed)
        outputs = {
            name: probe(predict(model, work.task, e, accelerator, 2 * chosen.batch))
            for name, e in {"": work.test, **work.shift}.items()
        }
    answers = judge.answers(work, outputs.pop(""), outputs)
    size = probe.weight.numel() + probe.bias.numel()
    return Base(probe, answers, size, peak.size_bytes, time.monotonic() - started, notes)


class _Features(nn.Module):
    """The model up to its pooling, as a module that `predict` can call."""

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.features(batch)


def _affordable(model: nn.Module, work: Work, chosen: Chosen, accelerator: "Accelerator") -> list[int]:
    """The training rows whose features take at most a third of the time; a sample by class where that is not all."""
    rows = subset(len(work.train), None, 4 * chosen.batch, chosen.seed)
    start = time.monotonic()
    predict(model, work.task, work.train.select(rows), accelerator, 2 * chosen.batch)
    per_row = _agreed((time.monotonic() - start) / len(rows))
    fixed = len(work.test) + sum(map(len, work.shift.values()))
    most = int(60 * (chosen.minutes or 0) / 3 / per_row) - fixed
    return subset(len(work.train), _strata(work), max(most, 10 * work.task.outputs, 200), chosen.seed)


def _strata(work: Work) -> list[Any] | None:
    return work.train.targets.tolist() if work.task.labels.kind in ("binary", "multiclass") else None


def _mean_loss(work: Work) -> Loss:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        total, count = work.task.loss(outputs, {"targets": targets})
        return total / count

    return loss


def _method(recipe: Recipe, plan: Plan) -> tuple[Method, Preset]:
    """The method with what was said and, for the rest, its preset."""
    said = recipe.method.settings if recipe.method else {}
    name = recipe.method.name if recipe.method else "lora"
    rates = preset(name)
    plan.decide("method", recipe.method and name, name, "the best known quality for its cost, and it merges")
    for field, value in {**rates.settings, **said}.items():
        plan.decide(field, said.get(field), value, f"the preset of {name}")
    return MethodPart(name=name, **{**rates.settings, **said}).build(), rates


def _choose(said: TrainPart, rates: Preset, work: Work, plan: Plan, seed: int) -> Chosen:
    """Everything but the number of steps, which needs a measurement."""
    device = next(work.model.parameters()).device
    rows = len(work.train)
    fitting = 32 if rows >= 4000 else 16 if rows >= 200 else 8
    batch = plan.decide(
        "batch", said.batch, fitting, "at most 32: adapters learn worse from larger ones; fewer for few rows"
    )
    precision, why, seconds = _agreed(choose_precision(lambda p: _trial(work, p), device))
    plan.decide("precision", None, "fp32" if precision == "no" else precision, why)
    default = DEFAULT_MINUTES_ON_CPU if device.type == "cpu" and said.epochs is None and said.steps is None else None
    why = "a first answer soon; more with --minutes or --epochs" if default else "no limit"
    minutes = plan.decide("minutes", said.minutes, default, why)
    if minutes is not None and seconds is not None and work.recipe.task.max_length is None:
        _shorten(work, plan, seconds, minutes)
    return Chosen(
        precision=precision,
        batch=batch,
        accumulate=plan.decide("accumulate", said.accumulate, 1, "a batch fits"),
        learning_rate=plan.decide("learning_rate", said.learning_rate, rates.learning_rate, rates.why),
        head_learning_rate=plan.decide(
            "head_learning_rate",
            said.head_learning_rate,
            rates.head_learning_rate,
            "the head starts from the linear probe",
        ),
        weight_decay=plan.decide(
            "weight_decay", said.weight_decay, rates.weight_decay, "a little, against overfitting"
        ),
        warmup=plan.decide("warmup", said.warmup, 0.06, "share of the steps"),
        label_smoothing=plan.decide(
            "label_smoothing", said.label_smoothing, 0.0, "none: it cost accuracy or brought nothing"
        ),
        clip=plan.decide("clip", said.clip, 1.0, "of the gradient's norm"),
        patience=plan.decide("patience", said.patience, 5, "evaluations without a better metric"),
        epochs=plan.decide("epochs", said.epochs, rates.epochs, "at most"),
        minutes=minutes,
        max_length=work.task.max_length,
        seed=seed,
    )


def _shorten(work: Work, plan: Plan, seconds: float, minutes: float) -> None:
    """Cut texts shorter where not even one epoch of them would fit the time."""
    per_token = seconds / (len(_TRIAL) * max(work.train.lengths[i] for i in _trial_rows(work)))
    length = shorter_length(work.task.max_length, sum(work.train.lengths), per_token, minutes)
    if length < work.task.max_length:
        why = f"at {work.task.max_length} not one epoch fits the time; seeing all rows is worth more"
        plan.replace("max_length", length, why)
        work.cut(length)


def _trial_rows(work: Work) -> list[int]:
    return [i % len(work.train) for i in _TRIAL]


def _trial(work: Work, precision: str) -> None:
    """One forward and backward through the frozen model, to see what it costs."""
    rows = work.task.collate(work.train, _trial_rows(work))
    embedding = work.model.body.get_input_embeddings()  # type: ignore[operator]
    inputs = {name: value for name, value in rows.items() if name not in ("targets", "input_ids")}
    x = embedding(rows["input_ids"]).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = work.model.body(inputs_embeds=x, **inputs).last_hidden_state
    torch.autograd.grad(out.float().sum(), x)


def _attach(method: Method, work: Work, chosen: Chosen, plan: Plan) -> AdapterSet:
    """Attach to the layers that the task really uses, choosing parameters first where the method does."""
    body = work.model.body
    if isinstance(method, Selective):
        method = _choose_parameters(method, work, chosen)
    elif method.targets.is_auto:
        sites, used = method.resolve(body).sites, _used(work, chosen)
        idle = [site.name for site in sites if site.path not in used]
        if idle:
            method = dataclasses.replace(method, targets=_exactly([site for site in sites if site.path in used]))
            plan.decide("left out", None, ", ".join(idle), "layers that this task does not use")
    adapters = attach(body, method, seed=chosen.seed)
    plan.decide("sites", None, str(len(adapters.sites("default"))), adapters.report().splitlines()[0])
    return adapters


def _exactly(sites: list[Site]) -> Targets:
    """Targets that name these sites and no others."""
    targets = Targets.exactly(site.path for site in sites if site.parameter is None)
    for site in sites:
        if site.parameter is not None:
            targets |= Targets.exactly([site.path]).parameter(site.parameter)
    return targets


def _choose_parameters(method: Selective, work: Work, chosen: Chosen) -> Selective:
    batches = iter(LengthBucketedBatches(work.train.lengths, batch_size=chosen.batch, seed=chosen.seed))

    def loss() -> Tensor:
        batch = work.task.collate(work.train, next(batches))
        total, count = work.task.loss(work.model(batch), batch)
        return total / count

    return method.choose(work.model.body, loss, batches=min(8, max(1, len(work.train) // chosen.batch)))


def _used(work: Work, chosen: Chosen) -> set[str]:
    """Paths in the body of the modules that the task's loss depends on.

    A zero that requires a gradient is added to each module's output; one that gets none belongs to a module in vain.
    """
    zeros: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def add_zero(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                used.add(path)
                return None
            return output + zeros.setdefault(path, torch.zeros((), requires_grad=True)).to(output)

        return add_zero

    used: set[str] = set()
    hooks = [module.register_forward_hook(hook(path)) for path, module in work.model.body.named_modules()]
    try:
        batch = _first_batch(work, chosen, next(work.model.parameters()).device)
        loss, _ = work.task.loss(work.model(batch), batch)
    finally:
        for handle in hooks:
            handle.remove()
    gradients = torch.autograd.grad(loss, list(zeros.values()), allow_unused=True)
    return used | {path for path, gradient in zip(zeros, gradients, strict=True) if gradient is not None}


def _first_batch(work: Work, chosen: Chosen, device: torch.device) -> Batch:
    indices = next(iter(LengthBucketedBatches(work.train.lengths, batch_size=chosen.batch, seed=chosen.seed)))
    return {name: value.to(device) for name, value in work.task.collate(work.train, indices).items()}


def _choose_steps(
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


def _measure(work: Work, chosen: Chosen, accelerator: "Accelerator") -> tuple[float, float]:
    """Seconds per token of a training step, and of a forward pass, on a few of the first batches."""
    batches = [
        indices
        for indices, _ in zip(
            LengthBucketedBatches(work.train.lengths, batch_size=chosen.batch, seed=chosen.seed), range(4), strict=False
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


def _full(work: Work, chosen: Chosen, base: Base, accelerator: "Accelerator", console: "Console | None") -> Row:
    """Full fine-tuning of a fresh copy of the model: same start of the head, same steps, its own learning rate."""
    from .prepare import load_body

    recipe, rates = work.recipe, preset("full")
    body = load_body(work.located, recipe.model.dtype, recipe.model.revision).to(accelerator.device)
    model = TextClassifier(body, work.task.outputs).to(accelerator.device)
    base.start(model)
    full = dataclasses.replace(work, model=model)
    reached = _used(full, chosen)
    used = {name: p for name, p in body.named_parameters() if name.rpartition(".")[0] in reached}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in used)
    groups = [
        Group(parameters=used, learning_rate=rates.learning_rate, weight_decay=rates.weight_decay),
        Group(parameters=_head(model), learning_rate=rates.head_learning_rate, weight_decay=rates.weight_decay),
    ]
    loop = Loop(model, work.task, groups, work.train, work.valid, _settings(chosen, ""), accelerator, None)
    with peak_memory(accelerator.device) as peak, Progress(console, "full fine-tuning", chosen.steps) as bar:
        outcome = loop.run(bar)
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt("stopped while training the model to compare with; continue with --resume")
    found = work.task.predictions(predict(model, work.task, work.test, accelerator, 2 * chosen.batch))
    other = sum(p.nbytes for p in work.model.parameters())  # the tuned model, in memory all the while
    return judge.row(
        "full",
        work,
        found,
        trainable=sum(p.numel() for p in loop.trained.values()),
        peak_bytes=peak.size_bytes and peak.size_bytes - other,
        seconds=outcome.seconds,
        disk_bytes=sum(p.nbytes for p in model.parameters()),
    )


def _answers(work: Work, chosen: Chosen, accelerator: "Accelerator") -> judge.Answers:
    outputs = {
        name: predict(work.model, work.task, e, accelerator, 2 * chosen.batch)
        for name, e in {"": work.test, **work.shift}.items()
    }
    return judge.answers(work, outputs.pop(""), outputs)


def _groups(adapters: AdapterSet, model: TextClassifier, chosen: Chosen) -> list[Group]:
    return [
        Group(parameters=_named(adapters), learning_rate=chosen.learning_rate, weight_decay=chosen.weight_decay),
        Group(parameters=_head(model), learning_rate=chosen.head_learning_rate, weight_decay=chosen.weight_decay),
    ]


def _named(adapters: AdapterSet) -> dict[str, nn.Parameter]:
    return dict(adapters.named_parameters())


def _head(model: TextClassifier) -> dict[str, nn.Parameter]:
    return {f"head.{name}": p for name, p in model.head.named_parameters()}


def _settings(chosen: Chosen, fingerprint: str) -> Settings:
    fields = {f.name for f in dataclasses.fields(Settings)} & {f.name for f in dataclasses.fields(Chosen)}
    return Settings(**{name: getattr(chosen, name) for name in fields}, fingerprint=fingerprint)


def _said(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a resumed run has to say again; its paths may move, and the report may have more."""
    method = recipe.method or MethodPart()
    parts = {"task": recipe.task, "train": recipe.train, "method": method}
    keys = {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.model_dump(mode="json").items()
    }
    return {"model.dtype": recipe.model.dtype, "report.metric": recipe.report.metric, **keys}


def _fingerprint(work: Work) -> str:
    """Of what the recipe only points to: rows, labels, base."""
    digest = hashlib.sha256(json.dumps(work.task.describe(), sort_keys=True).encode())
    for examples in (work.train, work.valid):
        digest.update(json.dumps([list(row.values()) for row in examples.inputs]).encode())
        digest.update(examples.targets.numpy().tobytes())
    digest.update(fingerprint(work.model.body).encode())
    return digest.hexdigest()


def _finished(out: Path, checkpoints: Path, *, resume: bool, fresh: bool) -> bool:
    """True if there is nothing left to do.  Raises RecipeError where a run would overwrite or forget another."""
    if fresh:
        if out.exists() and any(out.iterdir()) and not is_result(out):
            raise RecipeError(f"{out} holds something that is no result of smidgen; choose another --out")
        return False
    if checkpoints.exists():
        if resume:
            return False
        raise RecipeError(
            f"{checkpoints} holds an unfinished run. Continue it with --resume, or start anew with --fresh"
        )
    if is_result(out) and not resume:
        raise RecipeError(f"{out} holds a finished run. Choose another --out, or replace it with --fresh")
    if out.exists() and any(out.iterdir()) and not is_result(out):
        raise RecipeError(f"{out} is not empty, and no result of smidgen; choose another --out")
    return is_result(out)


def _saved(checkpoints: Path, recipe: Recipe) -> tuple[Path, checkpoint.State, list[str]] | None:
    """The newest whole checkpoint, if there is one.  Raises CheckpointError if the recipe says something else now."""
    found = checkpoint.newest(checkpoints)
    if found is None:
        return None
    path, state, _ = found
    before, now = state.history.get("said"), _said(recipe)
    if before is None or state.history["chosen"].keys() != {field.name for field in dataclasses.fields(Chosen)}:
        raise CheckpointError(f"{path} was written by another version of smidgen. Start anew with --fresh")
    changed = [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(changed)}. "
            "Say it as before, choose another --out, or start anew with --fresh"
        )
    return found


def _continue(loop: Loop, saved: tuple[Path, checkpoint.State, list[str]], console: "Console") -> None:
    path, state, damaged = saved
    for line in damaged:
        console.print(f"[yellow]passed over[/yellow] {line}", highlight=False)
    if state.fingerprint != loop.settings.fingerprint:
        raise CheckpointError(
            f"{path} belongs to another run: the rows or the base model have changed since. "
            "Undo the change, choose another --out, or start anew with --fresh"
        )
    loop.resume(state)
    console.print(f"Resuming at step {loop.step} of {loop.settings.steps} from {path}", highlight=False)


def _is_main_process(device: torch.device) -> bool:
    from accelerate import PartialState

    return bool(PartialState(cpu=device.type == "cpu").is_main_process)


def _silent() -> "Console":
    from rich.console import Console

    return Console(quiet=True)


def _agreed(value: T) -> T:
    """The main process's value on all: what each measures for itself would differ."""
    from accelerate.utils import broadcast_object_list

    return cast(T, broadcast_object_list([value])[0])


def _show_plan(plan: Plan, checks: list[str], console: "Console") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for name, value, why in plan.entries:
        table.add_row(name, value, why)
    console.print(table)
    for line in checks:
        console.print(f"[green]ok[/green] {line}", highlight=False)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "safetensors", "torchmetrics")
    return {"smidgen": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }
