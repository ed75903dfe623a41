"""What need not be computed again: LoRA on the top layers, the frozen part replayed from the second look at a row on.

Sentiment of movie sentences, all-MiniLM-L6-v2 (6 layers), and a BERT of 12 such layers with random weights; LoRA of
rank 4 on every linear layer of the top blocks, AdamW, batches of 32, one thread. Counted are CPU seconds of an epoch of
the training alone: the first (ours with the pass that records all rows in it; in a run the linear probe's pass does
that by the way), and the median of the later ones. HF is Trainer with HF PEFT on the same layers, as it comes and with
bf16 and its grouping by length. Of L layers, a step with t trained ones is L forward and t backward passes, replayed t
and t; a backward pass is about two forward, so against the same run not replayed the gain is at most (L + 2t) / 3t: 2.7
for one of 6 layers, 4.7 for one of 12. Then what LoRA on 1, 2, 3 or all layers comes to in the same CPU time, recording
included.

    python benchmarks/replay.py [--rows 1024] [--epochs 4] [--seconds 120]
"""

import argparse
import copy
import dataclasses
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Spread, described, one_thread, save
from presets import BATCH, PRECISION, SEED, Bench, bench, chosen, for_trainer

from smidgen import LoRA
from smidgen.auto.plan import Plan
from smidgen.auto.presets import preset
from smidgen.recipes import adapt
from smidgen.recipes.prepare import Work, prepare
from smidgen.recipes.schema import ModelPart
from smidgen.training.loop import Loop, predict
from smidgen.training.progress import Progress
from smidgen.training.replay import Replay, find_replay
from smidgen.training.replay_store import Store

RANK, ALPHA, RATE = 4, 8.0, 2e-3
HF = {"HF": {}, "HF, bf16, by length": {"bf16": True, "train_sampling_strategy": "group_by_length"}}
PLAIN, REPLAYED = "smidgen, not replayed", "**smidgen**"


@dataclasses.dataclass(frozen=True)
class Epochs:
    """CPU seconds of each epoch, bytes that were kept, the training losses."""

    seconds: list[float]
    size_bytes: int = 0
    losses: Sequence[float] = ()

    @property
    def later(self) -> float:
        return statistics.median(self.seconds[1:])


class Clock(Progress):
    """Notes the CPU time after every so many steps, and every loss."""

    def __init__(self, every: int) -> None:
        super().__init__(None, "", 0)
        self.every, self.times, self.losses = every, [time.process_time()], list[float]()

    def step(self, step: int, loss: float, tokens: int) -> None:
        self.losses.append(loss)
        if step % self.every == 0:
            self.times.append(time.process_time())


def loop_of(bench: Bench, work: Work, layers: int | None, steps: int, replays: bool) -> tuple[Loop, int]:
    """A fresh body with LoRA on its top layers, ready to train; with the bytes that are kept."""
    rates = dataclasses.replace(preset("lora"), learning_rate=RATE)
    plan = dataclasses.replace(chosen(rates, steps, work), evaluate_every=steps, save_every=steps)
    method = adapt.in_top(LoRA(rank=RANK, alpha=ALPHA), work.model.body, layers)
    adapters = adapt.attach_used(method, work, plan, Plan())
    replay = None
    if replays:
        units, why = find_replay(work.model, work.task, work.train, bench.accelerator)
        assert units or layers is None, why
        if units:
            sets = {"train": work.train, "valid": work.valid}
            store = Store({name: len(rows) for name, rows in sets.items()}, limit_bytes=1 << 34)
            replay = Replay(work.model, units, store, sets)
            replay.fill("train", work.task, bench.accelerator, 2 * BATCH)
    groups, settings = adapt.groups_of(adapters, work.model, plan), adapt.settings_of(plan, "")
    size = replay.store.size_bytes if replay else 0
    return Loop(work.model, work.task, groups, work.train, work.valid, settings, bench.accelerator, None, replay), size


def fresh(bench: Bench, rows: int | None = None) -> Work:
    """The work with an untouched body, a head that starts from the probe, and the first rows alone."""
    model = copy.deepcopy(bench.work.model)
    bench.base.start(model)
    train = bench.work.train
    return dataclasses.replace(bench.work, model=model, train=train if rows is None else train.select(range(rows)))


def ours(bench: Bench, rows: int, layers: int, epochs: int, replays: bool) -> Epochs:
    work = fresh(bench, rows)
    every = -(-rows // BATCH)
    start = time.process_time()
    loop, size = loop_of(bench, work, layers, epochs * every, replays)
    prepared = time.process_time() - start
    clock = Clock(every)
    evaluation = time.process_time()
    predict(work.model, work.task, work.valid, bench.accelerator, 2 * BATCH)
    evaluation = time.process_time() - evaluation  # one at the start of the loop, one at its end
    clock.times = [time.process_time()]
    loop.run(clock)
    seconds = [after - before for before, after in itertools.pairwise(clock.times)]
    seconds[0] += (prepared if replays else 0.0) - evaluation
    return Epochs(seconds, size, clock.losses)


def theirs(bench: Bench, rows: int, layers: int, epochs: int, options: dict[str, Any]) -> Epochs:
    import peft
    from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    work = bench.work
    places = adapt.in_top(LoRA(), work.model.body, layers).resolve(work.model.body).sites
    model: Any = AutoModelForSequenceClassification.from_pretrained(work.asked.model.source, num_labels=2)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=int(ALPHA), target_modules=[site.path for site in places]
    )
    model = peft.get_peft_model(model, lora)
    data = for_trainer(work.train.select(range(rows)))
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    tokenizer: Any = work.task.tokenizer  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()])
        trainer.train()
    return Epochs([after - before for before, after in itertools.pairwise(times)])


def twelve_layers(folder: Path, six: Bench) -> str:
    """A BERT of MiniLM's widths with twice its layers and random weights, with MiniLM's tokenizer."""
    from transformers import AutoConfig, AutoModel

    source = six.work.asked.model.source
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "modules.json", "*_Pooling"))
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=12)).save_pretrained(folder)
    return str(folder)


def speed(bench: Bench, layers: int, said: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Epochs], float]:
    """Lines of the table, the runs, and the largest gap of a loss between replayed and not."""
    rounds: dict[str, list[Epochs]] = {}
    for _ in range(said.rounds):
        for name, options in HF.items():
            rounds.setdefault(name, []).append(theirs(bench, said.rows, layers, said.epochs, dict(options)))
        for name, replays in ((PLAIN, False), (REPLAYED, True)):
            rounds.setdefault(name, []).append(ours(bench, said.rows, layers, said.epochs, replays))
    lines = []
    for name, runs in rounds.items():
        over = [run.later / best.later for run, best in zip(runs, rounds[REPLAYED], strict=True)]
        first, later = (
            Spread.of([getter(run) for run in runs]) for getter in (lambda r: r.seconds[0], lambda r: r.later)
        )
        lines.append([f"{name}, top {layers}", first, later, Spread.of(over), runs[0].size_bytes or ""])
        print(layers, name, first.median, later.median, over, runs[0].size_bytes, flush=True)
    losses = (rounds[PLAIN][0].losses, rounds[REPLAYED][0].losses)
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"largest gap of a loss: {gap:.1e}", flush=True)
    return lines, {name: runs[0] for name, runs in rounds.items()}, gap


def quality(bench: Bench, layers: int | None, seconds: float) -> list[Any]:
    """What LoRA on so many top layers comes to in so much CPU time."""
    start = time.process_time()
    trial, size = loop_of(bench, fresh(bench), layers, 12, replays=True)
    prepared = time.process_time() - start
    clock = Clock(4)
    trial.run(clock)
    steps = max(20, int((seconds - prepared) / ((clock.times[3] - clock.times[1]) / 8)))
    work = fresh(bench)
    loop, _ = loop_of(bench, work, layers, steps, replays=True)
    loop.settings = dataclasses.replace(loop.settings, evaluate_every=max(1, steps // 8))
    start = time.process_time()
    outcome = loop.run(Progress(None, "", steps))
    spent = prepared + time.process_time() - start
    answers = predict(work.model, work.task, work.test, bench.accelerator, 2 * BATCH).answers
    right = work.task.score(answers, work.test.targets)["accuracy"]
    epochs = steps * BATCH / len(work.train)
    count = sum(p.numel() for p in loop.trained.values())
    found = [
        "all" if layers is None else f"top {layers}",
        count,
        steps,
        f"{epochs:.1f}",
        spent,
        size or "",
        f"{right:.3f}",
    ]
    print(*found, f"best step {outcome.best_step}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU time of each run that is judged; 0 for none")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the demo's archive is")
    said = parser.parse_args()
    one_thread()
    six = bench(said.cache, said.epochs)
    with tempfile.TemporaryDirectory() as folder:
        recipe = six.work.recipe.model_copy(update={"model": ModelPart(path=twelve_layers(Path(folder) / "12", six))})
        twelve = dataclasses.replace(six, work=prepare(recipe, Plan(), six.accelerator.device, SEED))
        tables, claims, gaps = [], [], []
        for name, each in (("all-MiniLM-L6-v2, 6 layers", six), ("12 layers of the same widths", twelve)):
            lines = []
            for layers in (1, 2):
                more, runs, gap = speed(each, layers, said)
                lines += more
                gaps.append(gap)
                rivals = {"HF": "HF Trainer with HF PEFT"}
                if each is twelve and layers == 1:
                    rivals[PLAIN] = "the same run not replayed"
                for rival, what in rivals.items():
                    claim = f"a later epoch over {what}, LoRA on the top {layers} of {name.split(', ')[-1]}"
                    claims.append({"claim": claim, "limit": 0.25, "is": runs[REPLAYED].later / runs[rival].later})
            columns = ["", "first epoch, CPU s", "a later epoch, CPU s", "times ours", "bytes kept"]
            title, plot = f"{name}; {said.rows} rows, {PRECISION}", [["a later epoch, CPU s"]]
            tables.append({"title": title, "columns": columns, "rows": lines, "plot": plot})
        if said.seconds:
            columns = ["LoRA on", "trained", "steps", "epochs", "CPU seconds", "bytes kept", "test accuracy"]
            rows = [quality(six, layers, said.seconds) for layers in (1, 2, 3, None)]
            title = f"the same CPU time, all rows; the linear probe has {_probe(six)}"
            tables.append({"title": title, "columns": columns, "rows": rows})
    text = f"{described(__doc__)} The largest gap between the losses of a step, replayed and not: {max(gaps):.0e}."
    save("replay", "What need not be computed again", text, tables, claims)


def _probe(bench: Bench) -> str:
    return f"{bench.work.task.score(bench.base.answers.test, bench.work.test.targets)['accuracy']:.3f}"


if __name__ == "__main__":
    main()
