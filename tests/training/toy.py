"""A task and a model so small that a run of the loop takes a tenth of a second; as a script, one of several ranks.

Rows are lists of digits of unequal length; the question is whether their mean is above 4.5.
"""

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import smidgen
from smidgen.recipes.prepare import make_accelerator
from smidgen.tasks.base import Batch, Examples, Task, TaskModel
from smidgen.training import checkpoint
from smidgen.training.distributed import end_together
from smidgen.training.loop import Loop, Outcome, Settings
from smidgen.training.optim import Group
from smidgen.training.progress import Progress


class Means(Task):
    name, metric = "means", "accuracy"

    @classmethod
    def understand(cls, tables, settings, asked):
        raise NotImplementedError

    def check(self, table):
        return {}

    def build(self, asked):
        raise NotImplementedError

    def encode(self, table):
        raise NotImplementedError

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        rows = [examples.inputs[i]["digits"] for i in indices]
        width = max(map(len, rows))
        digits = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
        return {"digits": digits, "mask": mask, "targets": examples.targets[list(indices)]}

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.float(), batch["targets"], reduction="sum"), len(batch["targets"])

    def score(self, answers, targets):
        return {"accuracy": float((answers.argmax(1) == targets).float().mean())}

    def describe(self):
        return {}

    @classmethod
    def from_description(cls, description, asked):
        raise NotImplementedError

    def predicted(self, table, answers):
        raise NotImplementedError


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(10, 6), nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, batch):  # (B, T) -> (B, 5)
        mask = batch["mask"][:, :, None]
        h = (self.embedding(batch["digits"]) * mask).sum(1) / mask.sum(1)
        return self.down(torch.tanh(self.up(h)))


class Classifier(TaskModel):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(5, 2)

    def forward(self, batch):
        return self.head(self.body(batch).float())


def rows(count: int, seed: int = 0) -> Examples:
    generator = random.Random(seed)
    digits = [[generator.randrange(10) for _ in range(generator.randint(1, 9))] for _ in range(count)]
    targets = torch.tensor([int(sum(row) / len(row) > 4.5) for row in digits])
    return Examples([{"digits": row} for row in digits], targets, [len(row) for row in digits], 0)


class At(Progress):
    """Shows nothing, and calls `do` after some steps; without it, asks the run to stop there."""

    def __init__(
        self, steps: Sequence[int] = (), do: Callable[[int], Any] = lambda step: signal.raise_signal(signal.SIGTERM)
    ):
        super().__init__(None, "", 0)
        self.at, self.do = steps, do

    def step(self, step: int, loss: float, tokens: int) -> None:
        if step in self.at:
            self.do(step)


def loop(
    folder: Path | None = None,
    *,
    train: Examples | None = None,
    task: Task | None = None,
    precision: str = "fp32",
    dropout: float = 0.3,
    **settings: Any,
) -> Loop:
    """A run of the toy, always with the same start."""
    torch.manual_seed(0)
    model = Classifier()
    adapters = smidgen.attach(model.body, smidgen.LoRA(rank=2, dropout=dropout, targets=("up", "down")), seed=0)
    usual: dict[str, Any] = {"steps": 12, "batch": 4, "evaluate_every": 4, "save_every": 1, "patience": None, "seed": 0}
    return Loop(
        model,
        task or Means(),
        [
            Group(parameters=dict(adapters.named_parameters()), learning_rate=0.02, weight_decay=0.01),
            Group(
                parameters={f"head.{n}": p for n, p in model.head.named_parameters()},
                learning_rate=0.02,
                weight_decay=0.0,
            ),
        ],
        train or rows(22),
        rows(20, seed=1),
        Settings(**{**usual, "fingerprint": "toy", **settings}),
        make_accelerator(torch.device("cpu"), precision),
        folder,
    )


def interrupted_and_resumed(folder: Path, stops: Sequence[int], **settings: Any) -> tuple[Loop, Outcome]:
    """A run that is asked to stop after each of these steps, and continued by a new loop each time."""
    for stop in [*stops, None]:
        run = loop(folder, **settings)
        found = checkpoint.newest(folder)
        if found is not None:
            run.resume(found[1])
        outcome = run.run(At([] if stop is None else [stop]))
        assert outcome.stopped == ("finished" if stop is None else "interrupted")
        run.accelerator.wait_for_everyone()  # only one of them writes
    return run, outcome


def digest(run: Loop) -> str:
    """The sha256 of everything that was trained."""
    content = b"".join(name.encode() + p.detach().numpy().tobytes() for name, p in sorted(run.trained.items()))
    return hashlib.sha256(content).hexdigest()


def one_of_several(folder: Path) -> None:
    """What each rank does: train plainly, train with dropout, and that again but interrupted; says what it came to."""
    torch.set_num_threads(1)
    plain = loop(folder / "plain", batch=2, dropout=0.0)
    plain.run(At())
    unbroken = loop(folder / "unbroken", batch=2, accumulate=2)
    unbroken.run(At())
    resumed, _ = interrupted_and_resumed(folder / "resumed", [5], batch=2, accumulate=2)
    found = {
        "plain": {name: p.tolist() for name, p in plain.trained.items()},
        "curves": plain.history["curves"],
        "digests": [digest(plain), digest(unbroken), digest(resumed)],
        "histories": [{**run.history, "seconds": 0} for run in (unbroken, resumed)],
    }
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    one_of_several(Path(sys.argv[1]))
    end_together()
