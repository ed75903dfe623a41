"""What adapting brought, against doing nothing and against training anew with all rows: run after the recipe.

Every line is judged on the same rows, one for each user, by the rank among all items that the user had not taken. What
adapting is ahead by comes with its 95 % interval, from a paired bootstrap over the users.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from prepare import EPOCHS, KIND, OUT
from torch import Tensor
from train_base import train_base

from smidgen.auto.plan import Plan
from smidgen.data.read import read
from smidgen.data.table import Table
from smidgen.evaluate.bootstrap import paired_difference_interval
from smidgen.recipes.save import load_result
from smidgen.tasks.base import Asked, Task, TaskModel
from smidgen.tasks.models import locate
from smidgen.tasks.ranking.recommenders import save_recommender
from smidgen.tasks.recommendation import Recommendation, RecommendationSettings

TUNED = Path("out/recommendation")
FILES = {side: OUT / f"{side}s.csv" for side in ("user", "item")}
METRIC = "ndcg@10"
JUDGED = {"new users": "test.csv", "known users": "known_users.csv"}


@dataclass(frozen=True)
class Judged:
    """One way of coming to a recommender.   answers, targets: for each file of JUDGED."""

    name: str
    task: Task
    answers: list[Tensor]
    targets: list[Tensor]
    trained: int = 0
    seconds: float = 0.0

    def values(self) -> list[float]:
        return [self.task.score(*pair)[METRIC] for pair in zip(self.answers, self.targets, strict=True)]


def main() -> None:
    tables = {name: read(OUT / file)[0] for name, file in JUDGED.items()}
    lines = []
    for how in ("mean", "neighbours"):
        start = time.monotonic()
        task, model = untouched(OUT / "base", how)
        found = judge(f"nothing, new rows from {how}", task, model, tables)
        if how == "mean":
            popular = [task.constant(targets, len(targets))[1] for targets in found.targets]
            lines.append(Judged("popularity", task, popular, found.targets))
        lines.append(replace(found, seconds=time.monotonic() - start))
    both = [read(OUT / name)[0] for name in ("base.csv", "train.csv")]
    rows = [row for table in both for row in zip(*map(table.column, ("user", "item", "time")), strict=True)]
    anew, seconds = train_base(KIND, [(u, i, float(t)) for u, i, t in rows], FILES, epochs=EPOCHS)
    save_recommender(anew, OUT / "retrained")
    found = judge("retrained with all rows", *untouched(OUT / "retrained", "mean"), tables)
    lines.append(replace(found, trained=sum(p.numel() for p in anew.parameters()), seconds=seconds))

    tuned = load_result(TUNED)
    row = next(row for row in json.loads((TUNED / "report.json").read_text())["rows"] if row["name"] == "tuned")
    adapted = judge("adapted", tuned.task, tuned.model, tables)
    lines.append(replace(adapted, trained=row["trainable"], seconds=row["seconds"]))

    heads = [f"{name:>13}{'adapted is ahead by':>32}" for name in tables]
    print(f"{METRIC:30}{''.join(heads)}{'trained':>12}{'seconds':>9}")
    for line in lines:
        cells = [f"{value:13.3f}{ahead(adapted, line, i):>32}" for i, value in enumerate(line.values())]
        print(f"{line.name:30}{''.join(cells)}{line.trained:12,}{line.seconds:9.1f}")


def ahead(adapted: Judged, line: Judged, i: int) -> str:
    """By how much what was adapted is ahead of a line, with its interval; nothing beside itself."""
    if line.name == adapted.name:
        return ""
    low, high = paired_difference_interval(
        lambda answers, targets: adapted.task.score(answers, targets)[METRIC],
        adapted.answers[i],
        line.answers[i],
        adapted.targets[i],
        seed=0,
    )
    return f"{adapted.values()[i] - line.values()[i]:+.3f} [{low:+.3f}, {high:+.3f}]"


def untouched(folder: Path, how: str) -> tuple[Recommendation, TaskModel]:
    """A recommender with rows for whoever is new in train.csv, none of them trained."""
    settings = RecommendationSettings(warm_start=how, users=str(FILES["user"]), items=str(FILES["item"]))
    asked = Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0)
    train = read(OUT / "train.csv")[0]
    task = Recommendation.understand({"train": train}, settings, asked)
    model = task.build(asked)
    task.settle(model, train, asked)
    return task, model.eval()


@torch.no_grad()
def judge(name: str, task: Task, model: TaskModel, tables: dict[str, Table]) -> Judged:
    answers, targets = [], []
    for table in tables.values():
        examples = task.encode(table)
        batch = task.collate(examples, range(len(examples)))
        answers.append(task.answer(model(batch), batch))
        targets.append(examples.targets)
    return Judged(name, task, answers, targets)


if __name__ == "__main__":
    main()
