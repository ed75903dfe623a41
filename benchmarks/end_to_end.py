"""Real tokens per second of training, from rows to a trained adapter: smidgen's loop against HF Trainer with HF PEFT.

Sentiment of movie sentences (2 to 60 tokens and more), all-MiniLM-L6-v2, LoRA of rank 4 on every linear layer of the
blocks, AdamW at 2e-3, batches of 32, the same steps, one thread. HF's batches are drawn at random and padded to their
longest row, as Trainer does; "by length" is its own grouping, and bf16 its own autocast. Counted are tokens that are no
padding, and CPU and wall seconds of the training alone; rounds by turns, each with a seed of its own. The peak is
resident memory while training above that before it, with the model loaded: gradients, the optimiser's states and
batches count.

    python benchmarks/end_to_end.py [--steps 60] [--rounds 3]
"""

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Seconds, Spread, described, one_thread, peak_extra_bytes, save
from presets import PRECISION, Bench, bench, for_trainer, train

from smidgen.auto.presets import preset
from smidgen.training.loop import predict

RATE, RANK, ALPHA, BATCH = 2e-3, 4, 8.0, 32
OURS = "**smidgen**"
HF = {
    "HF Trainer, HF PEFT, as they come": {},
    "HF, bf16": {"bf16": True},
    "HF, bf16, by length": {"bf16": True, "train_sampling_strategy": "group_by_length"},
}


@dataclasses.dataclass(frozen=True)
class Found:
    """One run: real tokens, what they took, share of the test rows that are right, bytes beside the model."""

    tokens: int
    seconds: Seconds
    accuracy: float
    peak_bytes: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds.cpu

    @property
    def wall_speed(self) -> float:
        return self.tokens / self.seconds.wall


def ours(bench: Bench, seed: int) -> Found:
    """Evaluation is at the start and at the end only, and its time is taken off."""
    start = Seconds.now()
    predict(bench.work.model, bench.work.task, bench.work.valid, bench.accelerator, 2 * BATCH)
    once = Seconds.now() - start
    trained = train(bench, "lora", dataclasses.replace(preset("lora"), learning_rate=RATE), at_the_end=True, seed=seed)
    work = trained.work
    answers = predict(work.model, work.task, work.test, bench.accelerator, 2 * BATCH).answers
    right = work.task.score(answers, work.test.targets)["accuracy"]
    per_row = sum(work.train.lengths) / len(work.train)
    seconds = trained.seconds - once - once
    return Found(int(per_row * BATCH * bench.steps), seconds, right, trained.peak_bytes)


def theirs(bench: Bench, options: dict[str, Any], seed: int) -> Found:
    import peft
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    work = bench.work
    model: Any = AutoModelForSequenceClassification.from_pretrained(work.asked.model.source, num_labels=2)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(model, lora)

    tokenizer: Any = work.task.tokenizer  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=bench.steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=2 * BATCH,
            learning_rate=RATE,
            warmup_steps=round(0.06 * bench.steps),
            weight_decay=0.01,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **options,
        )
        rows = for_trainer(work.train)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        taken: list[Seconds] = []

        def run() -> None:
            start = Seconds.now()
            trainer.train()
            taken.append(Seconds.now() - start)

        peak_bytes = peak_extra_bytes(run)
        logits = trainer.predict(for_trainer(work.test)).predictions
    right = float((torch.as_tensor(logits).argmax(1) == work.test.targets).float().mean())
    per_row = sum(work.train.lengths) / len(work.train)
    return Found(int(per_row * BATCH * bench.steps), taken[0], right, peak_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the demo's archive is")
    said = parser.parse_args()
    one_thread()
    everything = bench(said.cache, said.steps)
    found: dict[str, list[Found]] = {name: [] for name in (*HF, OURS)}
    for seed in range(said.rounds):
        for name, options in HF.items():
            found[name].append(theirs(everything, copy.deepcopy(options), seed))
        found[OURS].append(ours(everything, seed))
        for name, runs in found.items():
            last = runs[-1]
            speed = f"{last.speed:8.0f} tokens/s, by wall time {last.wall_speed:8.0f}"
            print(f"{name:36s} {speed}  {last.accuracy:.3f}  {last.peak_bytes / 2**20:.0f} MB", flush=True)
    first = found[next(iter(HF))]
    rows, over = [], {}
    for name, runs in found.items():
        over[name] = Spread.of([run.speed / other.speed for run, other in zip(runs, first, strict=True)])
        speed, wall = Spread.of([run.speed for run in runs]), Spread.of([run.wall_speed for run in runs]).median
        peak = Spread.of([run.peak_bytes for run in runs]).over(2**20).median
        accuracy = sum(run.accuracy for run in runs) / len(runs)
        rows.append([name, speed, over[name], wall, peak, f"{accuracy:.3f}"])
    title = f"{said.steps} steps of {BATCH}, {PRECISION} where ours measured it faster"
    columns = ["", "real tokens per CPU second", "over HF as it comes", "real tokens per wall second"]
    columns += ["peak above the model, MB", "test accuracy, mean of seeds"]
    claim = {
        "claim": "HF's tokens per second over ours, variable-length text",
        "limit": 1 / 3,
        "is": 1 / over[OURS].median,
    }
    tables = [{"title": title, "columns": columns, "rows": rows, "plot": [[columns[2]], [columns[4]]]}]
    save("end_to_end", "From rows to a trained adapter", described(__doc__), tables, [claim])


if __name__ == "__main__":
    main()
