"""One run, from recipe to report: prepare, plan, probe the base, attach, check, train, judge, save.

OUT/               the result, written once and whole: adapter, head, recipe, report.json, report.html, README.md
OUT.checkpoints/   while it is not finished; `--resume` continues from there
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import __version__
from ..auto.plan import Plan
from ..auto.preflight import preflight
from ..core.attention_backward import short_attention_backward_in_fp32
from ..core.errors import CheckpointError, RecipeError
from ..core.files import remove_directory
from ..core.fingerprint import fingerprint_as_held
from ..core.products import products_by
from ..core.recompute import recompute
from ..evaluate.terminal import show
from ..training import checkpoint
from ..training.distributed import shard_blocks
from ..training.loop import Loop
from ..training.memory import peak_memory
from ..training.progress import Progress
from ..training.trials import undone
from . import judge
from .adapt import adapter_parameters, attach_used, fully_tuned, groups_of, head_parameters, in_top, settings_of
from .choose import Chosen, agreed, choose, choose_steps_for, method_of, trial_batches
from .fit import choose_memory, refuse_impossible, within_memory
from .prepare import Work, best_device, digest_rows, make_accelerator, prepare, set_threads
from .probing import answers_of, fit_base
from .replaying import Place, again, fill, foresee, settle
from .save import is_result, save_result
from .schema import MethodPart, Recipe, TaskPart, TrainPart

if TYPE_CHECKING:
    from rich.console import Console


T = TypeVar("T")


def tune(recipe: Recipe, *, resume: bool, fresh: bool, console: "Console") -> Path:
    """Run a recipe; returns the folder of the result.

    resume: continue from the newest whole checkpoint, or start where there is none.   fresh: start anew, replacing.
    Raises SmidgenError subclasses; what was saved before stays.
    """
    with ExitStack() as held, short_attention_backward_in_fp32():
        return _tune(recipe, resume=resume, fresh=fresh, console=console, held=held)


def _tune(recipe: Recipe, *, resume: bool, fresh: bool, console: "Console", held: ExitStack) -> Path:
    """held: what is to last until the run ends."""
    started = time.monotonic()
    out = recipe.out or Path("out") / f"{Path(recipe.data.train).stem}-{recipe.method_object().name}"
    if out.name in ("", ".."):
        raise RecipeError(f"--out {out} is no folder of its own; a result is written and replaced as a whole")
    checkpoints = out.with_name(out.name + ".checkpoints")
    device = best_device()
    is_main, world = _processes(device)
    quiet = not is_main
    if quiet:
        console = _silent()
    if not recipe.dry_run and _finished(out, checkpoints, resume=resume, fresh=fresh):
        remove_directory(checkpoints)  # whoever finished it may have been killed while doing this
        console.print(f"{out} is finished: nothing to resume", highlight=False)
        return out
    saved = _saved(checkpoints, recipe) if resume else None
    if recipe.train.shard and world == 1:
        raise RecipeError(
            "train.shard spreads the base over several processes, and this run is one: start it with torchrun "
            "--nproc-per-node N -m smidgen tune ..., or leave train.shard out"
        )
    plan = Plan()
    seed = plan.decide("seed", recipe.train.seed, 0, "the same run twice is the same result")
    plan.decide("threads", recipe.train.threads, set_threads(recipe.train.threads), "the cores this process may use")
    data = recipe.data.train if recipe.data.train != recipe.model.path else "its own data"
    console.print(f"[bold]smidgen {__version__}[/bold]  {recipe.model.path}  on  {data}", highlight=False)
    work = prepare(recipe, plan, device, seed)
    said, rates = method_of(recipe, work, plan)
    method = said.build()
    refuse_impossible(recipe.train, work)
    chosen = choose(recipe.train, rates, work, plan, seed)
    if chosen.shard:
        spread = shard_blocks(work.model.body, device)
        share = f"{spread / world:,.0f} weights"
        plan.decide("shard", None, share, f"in each of {world} processes, of {spread:,}")
        work.model.to(device)
    if saved is not None:
        chosen = Chosen(**saved[1].history["chosen"])  # measured then; measured again it might differ
        if chosen.max_length is not None and chosen.max_length != work.task.max_length:
            work.cut(chosen.max_length)
    held.enter_context(products_by(chosen.products))
    work.task.label_smoothing = chosen.label_smoothing
    accelerator = make_accelerator(device, chosen.precision)

    method = in_top(method, work.model.body, recipe.train.top_layers)
    stamp = _fingerprint(work)
    if saved is not None:
        _require_same(saved, stamp)
    foreseen = foresee(recipe.train, method, work, chosen, accelerator, checkpoints, resumed=saved is not None)
    recorded = foreseen.replay if foreseen else None
    base = within_memory(lambda: fit_base(work, chosen, accelerator, recorded), chosen, plan)
    base.start(work.model)
    base_said = judge.said(work)
    adapters = attach_used(method, work, chosen, plan)
    trained = {**adapter_parameters(adapters), **head_parameters(work.model)}
    parameters = sum(p.numel() for p in trained.values())
    share = f"{parameters / work.total_parameters:.2%} of the model's {work.total_parameters:,}"
    plan.decide("trained", None, f"{parameters:,} parameters", share)
    if saved is None:
        with undone(work.model):
            choose_memory(recipe.train, chosen, work, parameters, accelerator, plan)
    place: Place | None = None
    with recompute(work.model, chosen.recompute, offload=chosen.offload):

        def check() -> list[str]:
            return preflight(work.model, adapters, trained, work.task, trial_batches(work, chosen, device))

        def measure() -> Place | None:
            spent = time.monotonic() - started
            place, speed, recording = settle(
                recipe.train, work, chosen, accelerator, plan, foreseen, checkpoints, spent
            )
            spent = time.monotonic() - started + recording
            choose_steps_for(recipe.train, chosen, work, accelerator, plan, speed, spent)
            return place

        checks = within_memory(check, chosen, plan)
        if saved is None:
            with undone(work.model):
                place = within_memory(measure, chosen, plan)
    if saved is None:
        chosen = agreed(chosen)
    else:
        place = again(recipe.train, work, chosen, accelerator, foreseen, checkpoints)
        plan.entries = [(name, value, why) for name, value, why in saved[1].history["plan"]]
    _show_plan(plan, checks, console)
    if recipe.dry_run:
        console.print("Dry run: everything is checked, nothing was trained.")
        return out

    if fresh:
        if checkpoints.exists() and not quiet:
            remove_directory(checkpoints)
        accelerator.wait_for_everyone()  # a replay may have files there
    replay = fill(place, foreseen, work, chosen, accelerator)
    foreseen = None  # its room, if it is not used
    for note in replay.store.notes if replay else ():
        console.print(f"[yellow]replay[/yellow] {note}", highlight=False)
    loop = Loop(
        work.model,
        work.task,
        groups_of(adapters, work.model, chosen),
        work.train,
        work.valid,
        settings_of(chosen, stamp),
        accelerator,
        checkpoints,
        replay=replay,
    )
    loop.history |= {"chosen": dataclasses.asdict(chosen), "said": _said(recipe), "plan": plan.entries}
    if saved is not None:
        _continue(loop, saved, console)
    shown = Progress(None if quiet else console, "tuning", chosen.steps, loop.step, unit=work.task.unit)
    with peak_memory(device) as peak, shown as bar:
        outcome = loop.run(bar)
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt(
            f"stopped at step {outcome.step} of {chosen.steps}; all is saved, continue with --resume"
        )
    notes = [*work.data.notes, *base.notes]
    if outcome.split > chosen.split:
        chosen.split = outcome.split
        notes.append(f"Memory did not suffice for a batch at once: in the end {chosen.rows} rows ran at a time.")
    tuned, tuned_said = answers_of(work, chosen, accelerator, replay), judge.said(work)
    loop.replay = replay = None  # what was kept is needed no more
    rows = [
        *filter(None, [judge.constant(work)]),
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
    full = None
    if "full" in recipe.report.against:
        full = fully_tuned(work, chosen, base, accelerator, console if not quiet else None)
    if quiet:
        return out
    samples = judge.samples(work, base_said, tuned_said)
    report = judge.report(
        work, rows, base.name, base.answers, tuned, full, outcome, plan, method.name, notes, samples, _versions()
    )
    resolved = _resolved(recipe, out, work, said, chosen)
    report = save_result(out, work, adapters, report, resolved, replace=fresh or resume)
    if checkpoints.exists():
        remove_directory(checkpoints)
    show(report, console)
    console.print(
        f"\nSaved in {out} after {time.monotonic() - started:.0f} s. Look: {out / 'report.html'}", highlight=False
    )
    return out


def _said(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a resumed run has to say again; its paths may move, and the report may have more."""
    parts = {"task": recipe.task, "train": recipe.train, "method": recipe.method_part}
    keys = {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.model_dump(mode="json").items()
    }
    model = {"model.dtype": recipe.model.dtype, "model.quantize": recipe.model.quantize}
    return {**model, "report.metric": recipe.report.metric, **keys}


def _fingerprint(work: Work) -> str:
    """Of what the recipe only points to: rows, labels, base."""
    digest = hashlib.sha256(json.dumps(work.task.describe(), sort_keys=True).encode())
    for examples in (work.train, work.valid):
        digest_rows(digest, examples)
    digest.update(fingerprint_as_held(work.model.body).encode())
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


def _resolved(recipe: Recipe, out: Path, work: Work, method: MethodPart, chosen: Chosen) -> Recipe:
    """The recipe with everything said that the plan chose: it runs the same again."""
    numbers = {name: getattr(chosen, name) for name in TrainPart.model_fields if hasattr(chosen, name)}
    numbers["label_smoothing"] = chosen.label_smoothing or None  # not for every kind
    numbers |= {"epochs": None, "minutes": None, "threads": torch.get_num_threads()}  # the steps say it
    numbers["top_layers"] = recipe.train.top_layers
    columns = {**recipe.data.columns, **work.task.resolved_columns()}
    settings = recipe.task.settings | {k: v for k, v in work.task.resolved_settings().items() if v is not None}
    return recipe.model_copy(
        update={
            "out": out,
            "train": TrainPart(**numbers),
            "task": TaskPart(
                name=recipe.task.name, **{key: value for key, value in settings.items() if value is not None}
            ),
            "method": method,
            "data": recipe.data.model_copy(update={"columns": columns}),
        }
    )


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


def _require_same(saved: tuple[Path, checkpoint.State, list[str]], stamp: str) -> None:
    """Raise CheckpointError if the rows or the base are others than those of the checkpoint."""
    if saved[1].fingerprint != stamp:
        raise CheckpointError(
            f"{saved[0]} belongs to another run: the rows or the base model have changed since. "
            "Undo the change, choose another --out, or start anew with --fresh"
        )


def _continue(loop: Loop, saved: tuple[Path, checkpoint.State, list[str]], console: "Console") -> None:
    path, state, damaged = saved
    for line in damaged:
        console.print(f"[yellow]passed over[/yellow] {line}", highlight=False)
    loop.resume(state)
    console.print(f"Resuming at step {loop.step} of {loop.settings.steps} from {path}", highlight=False)


def _processes(device: torch.device) -> tuple[bool, int]:
    """Whether this is the main process, and how many there are."""
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return bool(state.is_main_process), int(state.num_processes)


def _silent() -> "Console":
    from rich.console import Console

    return Console(quiet=True)


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
