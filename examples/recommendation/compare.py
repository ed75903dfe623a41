"""What adapting brought, against doing nothing and against training anew with all rows: run after the recipe.

Every line is judged on the same rows, by the rank among all items that the user had not taken.
"""

import json
import time
from pathlib import Path

import torch
from prepare import EPOCHS, KIND, OUT
from train_base import train_base

from smidgen.auto.plan import Plan
from smidgen.data.read import read
from smidgen.data.table import Table
from smidgen.recipes.save import load_result
from smidgen.tasks.base import Asked, Task, TaskModel
from smidgen.tasks.models import locate
from smidgen.tasks.ranking.recommenders import save_recommender
from smidgen.tasks.recommendation import Recommendation, RecommendationSettings

TUNED = Path("out/recommendation")
FILES = {side: OUT / f"{side}s.csv" for side in ("user", "item")}
JUDGED = {"new users": "test.csv", "known users": "known_users.csv"}


def main() -> None:
    tables = {name: read(OUT / file)[0] for name, file in JUDGED.items()}
    print(f"{'ndcg@10':34}{''.join(f'{name:>14}' for name in tables)}{'trained':>12}{'seconds':>10}")
    for how in ("mean", "neighbours"):
        start = time.monotonic()
        task, model = untouched(OUT / "base", how)
        if how == "mean":
            line("popularity", [task.score(task.constant(e, len(e))[1], e) for e in targets(task, tables)], 0, 0.0)
        line(f"nothing, new rows from {how}", judge(task, model, tables), 0, time.monotonic() - start)
    tuned = load_result(TUNED)
    row = next(row for row in json.loads((TUNED / "report.json").read_text())["rows"] if row["name"] == "tuned")
    line("adapted", judge(tuned.task, tuned.model, tables), row["trainable"], row["seconds"])

    both = [read(OUT / name)[0] for name in ("base.csv", "train.csv")]
    rows = [row for table in both for row in zip(*map(table.column, ("user", "item", "time")), strict=True)]
    anew, seconds = train_base(KIND, [(u, i, float(t)) for u, i, t in rows], FILES, epochs=EPOCHS)
    save_recommender(anew, OUT / "retrained")
    task, model = untouched(OUT / "retrained", "mean")
    line("retrained with all rows", judge(task, model, tables), sum(p.numel() for p in anew.parameters()), seconds)


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
def judge(task: Task, model: TaskModel, tables: dict[str, Table]) -> list[dict[str, float]]:
    found = []
    for table in tables.values():
        examples = task.encode(table)
        batch = task.collate(examples, range(len(examples)))
        found.append(task.score(task.answer(model(batch), batch), examples.targets))
    return found


def targets(task: Task, tables: dict[str, Table]) -> list[torch.Tensor]:
    return [task.encode(table).targets for table in tables.values()]


def line(name: str, scores: list[dict[str, float]], trained: int, seconds: float) -> None:
    values = "".join(f"{score['ndcg@10']:14.3f}" for score in scores)
    print(f"{name:34}{values}{trained:12,}{seconds:10.1f}", flush=True)


if __name__ == "__main__":
    main()
