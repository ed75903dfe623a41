"""Recommendation: growing tables, warm starts, exact ranks, splits, and a whole run on made interactions."""

import csv
import json
import math
import random
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import smidgen
from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError
from smidgen.data.read import read
from smidgen.data.table import Table
from smidgen.recipes.load import recipe_from
from smidgen.recipes.run import tune
from smidgen.recipes.save import load_result
from smidgen.recipes.schema import Recipe
from smidgen.recipes.use import merge
from smidgen.tasks.base import Asked
from smidgen.tasks.models import Located
from smidgen.tasks.ranking.growing import GrownRecommender, matrix_of, mean_of_neighbours, neighbours
from smidgen.tasks.ranking.recommenders import (
    KINDS,
    Known,
    MatrixFactorisation,
    SASRec,
    TwoTowers,
    load_recommender,
    save_recommender,
)
from smidgen.tasks.recommendation import Recommendation, RecommendationSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import write_csv

PAIRS = [(u, i) for u in range(6) for i in range(8) if (u + i) % 2 == 0 and i != u]
KNOWN = Known(
    users=tuple(f"u{i}" for i in range(6)),
    items=tuple(f"i{i}" for i in range(8)),
    item_features=("genre=even", "genre=odd"),
    user_features=("age=old", "age=young"),
    interactions=torch.tensor(PAIRS),
)
FEATURES = {"user": torch.eye(2).repeat(3, 1), "item": torch.eye(2).repeat(4, 1)}


def made(kind: str):
    return TwoTowers(KNOWN, width=4, values=FEATURES) if kind == "two_towers" else KINDS[kind](KNOWN, width=4)


@pytest.fixture(params=list(KINDS))
def folder(request, tmp_path):
    save_recommender(made(request.param), tmp_path / "base")
    return tmp_path / "base"


def asked_for(folder, **columns) -> Asked:
    return Asked(
        model=Located(str(folder), str(folder), True), plan=Plan(), device=torch.device("cpu"), seed=0, columns=columns
    )


def table(rows, names=("user", "item", "time")) -> Table:
    columns = {name: [row[k] for row in rows] for k, name in enumerate(names)}
    return Table(columns, [f"t.csv:{i + 2}" for i in range(len(rows))])


TRAIN = [
    ("u0", "i3", 1),
    ("new", "i0", 2),
    ("new", "i2", 3),
    ("u2", "fresh", 4),
    ("new", "fresh", 5),
    ("u4", "fresh", 6),
]


def settled(folder, rows=TRAIN, **settings):
    asked, train = asked_for(folder), table(rows)
    task = Recommendation.understand({"train": train}, RecommendationSettings(**settings), asked)
    assert task.check(train) == {}
    model = task.build(asked)
    task.settle(model, train, asked)
    return task, model, train, asked


# -- recommenders -----------------------------------------------------------------------------------------------------


def test_a_recommender_comes_back_from_its_folder_bit_for_bit(folder):
    model = load_recommender(Located("m", str(folder), True))
    again = made(model.kind)
    assert model.known.items == KNOWN.items
    assert torch.equal(model.known.interactions, KNOWN.interactions)
    again.load_state_dict(model.state_dict())
    users, history, items = torch.tensor([0, 5]), torch.tensor([[-1, 2], [3, 4]]), torch.arange(8)
    assert torch.equal(model(users, history, items), again(users, history, items))


def test_the_sequence_model_ignores_padding_and_minds_the_order():
    model, items = SASRec(KNOWN, width=4).eval(), torch.arange(8)
    user = torch.tensor([0])
    scores = model(user, torch.tensor([[1, 2]]), items)
    assert torch.allclose(scores, model(user, torch.tensor([[-1, -1, 1, 2]]), items), atol=1e-6)
    assert not torch.allclose(scores, model(user, torch.tensor([[2, 1]]), items), atol=1e-4)
    assert torch.isfinite(model(user, torch.zeros(1, 0, dtype=torch.int64), items)).all()


def test_a_module_that_is_no_recommender_is_refused_with_all_it_lacks(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom smidgen.tasks.ranking.recommenders import Known, MatrixFactorisation\n"
        "def plain(): return torch.nn.Linear(2, 2)\n"
        "def short():\n"
        "    model = MatrixFactorisation(Known(users=('a', 'b'), items=('x', 'y')), width=2)\n"
        "    model.users, model.tables = torch.nn.Embedding(1, 2), {'users': 'user', 'itms': 'item'}\n"
        "    return model\n"
    )
    for name, text in (
        ("plain", "has no `known`"),
        ("short", '"users" has 1 rows for 2 users; "itms" is no table.*items?'),
    ):
        where = f"{tmp_path / 'mine.py'}:{name}"
        with pytest.raises(ModelError, match=text):
            load_recommender(Located(where, where, True))


def test_a_damaged_folder_is_a_model_error(folder):
    (folder / "names.json").write_text('{"users": ["a"]}')
    with pytest.raises(ModelError, match="no whole recommender"):
        load_recommender(Located("m", str(folder), True))


# -- growing ----------------------------------------------------------------------------------------------------------


def test_grown_tables_answer_for_old_rows_bit_for_bit_and_train_new_rows_alone(folder):
    before = load_recommender(Located("m", str(folder), True))
    task, model, train, _ = settled(folder)
    batch = task.collate(task.encode(train), [0, 3])
    with torch.no_grad():
        scores = model(batch)
        assert scores.shape == (2, 9)
        assert torch.equal(scores[:, :8], before(batch["users"], batch["history"], torch.arange(8)))
    for parameter in model.body.parameters():
        parameter.requires_grad_(False)
    old = {name: p.clone() for name, p in model.body.state_dict().items()}
    everything = task.collate(task.encode(train), range(len(train)))
    loss, count = task.loss(model(everything), everything)
    (loss / count).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.head.parameters())
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter -= 0.5 * parameter.grad
    assert all(torch.equal(old[name], p) for name, p in model.body.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(batch)[:, :8], scores[:, :8])
        assert not torch.equal(model(batch)[:, 8], scores[:, 8])


def test_lora_on_a_grown_table_leaves_new_rows_to_the_head():
    body = MatrixFactorisation(KNOWN, width=4)
    model = GrownRecommender(body, {"user": 0, "item": 2}, {})
    adapters = smidgen.attach(body, smidgen.LoRA(rank=2, targets="items"), seed=0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.normal_()
        vectors = body.items(torch.arange(10))
        assert torch.equal(vectors[8:], model.head.items.weight)
        assert not torch.allclose(vectors[:8], body.items.weight)


def test_what_is_new_is_found_and_said(folder):
    task, _, _, asked = settled(folder)
    assert task.catalogue.new == {"user": ["new"], "item": ["fresh"]}
    plan = {name: (value, why) for name, value, why in asked.plan.entries}
    assert plan["new users"] == ("1", "3 of 4 in training are among the base's 6")
    assert plan["new items"][0] == "1"
    assert plan["warm start"][0] == "neighbours"


def test_neighbours_are_weighted_by_the_cosine_of_what_was_taken():
    took = torch.tensor([(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (1, 4), (3, 0), (3, 1)])  # row 3 is new, 2 is empty
    weights, places = neighbours([matrix_of(took, (4, 5))], old=3)
    found = dict(zip(places[0].tolist(), weights[0].tolist(), strict=True))
    assert found == pytest.approx({0: 1.0, 1: 1 / math.sqrt(8), 2: 0.0})
    old = torch.randn(3, 2)
    expected = (old[0] + old[1] / math.sqrt(8)) / (1 + 1 / math.sqrt(8))
    assert torch.allclose(mean_of_neighbours(old, weights, places)[0], expected, atol=1e-6)
    assert torch.equal(mean_of_neighbours(old, torch.zeros(1, 3), places)[0], old.mean(0))


def test_warm_starts_are_what_they_say(folder):
    _, zeros, _, _ = settled(folder, warm_start="zeros")
    assert all(not p.any() for p in zeros.head.parameters())
    _, mean, _, _ = settled(folder, warm_start="mean")
    assert torch.allclose(mean.head.items.weight[0], mean.body.items.weight.mean(0))
    _, near, _, _ = settled(folder)
    assert not torch.allclose(near.head.items.weight, mean.head.items.weight)


def test_features_choose_neighbours_and_reach_the_towers(tmp_path):
    save_recommender(made("two_towers"), tmp_path / "base")
    with open(tmp_path / "items.csv", "w", newline="") as file:
        rows = [(f"i{k}", ("even", "odd")[k % 2], k) for k in range(8)]
        csv.writer(file).writerows([("id", "genre", "title"), *rows, ("fresh", "odd", "x")])
    task, model, _, asked = settled(
        tmp_path / "base", rows=[("new", "fresh", 1), ("other", "i1", 2)], items=str(tmp_path / "items.csv")
    )
    assert task.catalogue.features["item"] == [[1]]
    old = model.body.items.weight
    assert torch.allclose(model.head.items.weight[0], old[1::2].mean(0), atol=1e-6)  # no known user took it
    assert model.body.item_features(torch.tensor([8])).tolist() == [[0.0, 1.0]]
    assert "items are like none" not in {name: why for name, _, why in asked.plan.entries}["warm start"]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_strangers_and_bad_values_are_problems(folder):
    task, *_ = settled(folder)
    problems = task.check(
        table([("u1", "i1", 1), ("who", "i1", 1), ("u1", "what", 1), ("u1", "i1", "late"), ("", "i1", 1)])
    )
    assert problems == {
        1: 'user "who" is known neither to the base nor to the training rows',
        2: 'item "what" is known neither to the base nor to the training rows',
        3: "time 'late' is no number as the other times; write one",
        4: "no user",
    }


def test_a_history_ends_before_its_row(folder):
    task, _, train, _ = settled(folder)
    batch = task.collate(task.encode(train), [1, 4])
    assert batch["history"].tolist() == [[-1, -1], [0, 2]]
    assert batch["taken"].tolist() == [[0, 2, 8], [0, 2, 8]]
    old = task.collate(task.encode(train), [0])
    assert old["history"].tolist() == [[i for u, i in PAIRS if u == 0]]  # the base's own come first


def test_splits_go_by_time_unless_there_is_none(folder):
    task, _, train, _ = settled(folder)
    assert task.hold_out(train, 0.2, 0) == ([0, 1, 2, 3, 5], [4])  # only "new" has several
    task, *_ = settled(folder, split="time")
    assert task.hold_out(train, 0.3, 0)[1] == [4, 5]
    timeless = table([row[:2] for row in TRAIN], ("user", "item"))
    assert Recommendation.understand({"train": timeless}, RecommendationSettings(), asked_for(folder)).split == "random"
    with pytest.raises(DataError, match="no column says the time"):
        Recommendation.understand({"train": timeless}, RecommendationSettings(split="time"), asked_for(folder))


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_dates_of_a_file_are_times_and_others_are_named_with_their_place(folder, tmp_path, extension):
    days = ["2024-02-01", "2022-12-31T23:00:00Z", "2023-05-01", "2024-02-01T00:30:00+05:00", "2024-01-31 20:00:00"]
    path = tmp_path / f"rows.{extension}"
    if extension == "csv":
        write_csv(path, [("new", f"i{k}", day) for k, day in enumerate(days)], ("user", "item", "date"))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        date = pyarrow.array([datetime.fromisoformat(day) for day in days[:3]], pyarrow.timestamp("ms"))
        later = pyarrow.array([datetime.fromisoformat(f"2024-01-31T{hour}:00") for hour in (19, 20)], date.type)
        columns = {"user": ["new"] * 5, "item": [f"i{k}" for k in range(5)]}
        parquet.write_table(pyarrow.table(columns | {"date": pyarrow.chunked_array([date, later])}), path)
    (rows, problems), asked = read(path), asked_for(folder)
    task = Recommendation.understand({"train": rows}, RecommendationSettings(split="time"), asked)
    assert (problems, task.check(rows)) == ([], {})
    assert task.hold_out(rows, 0.4, 0) == ([1, 2, 3], [0, 4])
    task.settle(task.build(asked), rows, asked)
    assert task.taken.histories.items(task.catalogue.rows["user"]["new"]) == [1, 2, 3, 4, 0]
    other = table([("u1", "i1", "2024-02-01"), ("u1", "i1", 1706745600)], ("user", "item", "date"))
    assert list(task.check(other)) == [1]  # also in another file


def test_a_date_in_another_order_is_a_bad_row_of_its_file(folder, tmp_path):
    rows = [("new", "i1", "2024-02-01"), ("new", "i2", "12/31/2022"), ("new", "i3", "2023-01-01")]
    write_csv(tmp_path / "rows.csv", rows, ("user", "item", "time"))
    where = {"model": str(folder), "data": str(tmp_path / "rows.csv"), "out": str(tmp_path / "out")}
    recipe = recipe_from({**where, "task": "recommendation", "method": "head"})
    with pytest.raises(DataError, match=r"rows\.csv:3: time '12/31/2022' is no date in ISO 8601; write 2024-02-01 or"):
        tune(recipe, resume=False, fresh=False, console=Console(quiet=True))


def test_low_ratings_are_known_but_neither_learned_nor_judged(folder):
    asked = asked_for(folder)
    rows = table([("u0", "i1", 5), ("u0", "i3", 1)], ("user", "item", "rating"))
    task = Recommendation.understand({"train": rows}, RecommendationSettings(least_rating=3), asked)
    model = task.build(asked)
    task.settle(model, rows, asked)
    examples = task.encode(rows)
    assert task.loss(model(batch := task.collate(examples, [0, 1])), batch)[1] == 1
    answers = torch.tensor([[1.0] + [0.0] * 8, [9.0] + [0.0] * 8])
    assert task.score(answers, examples.targets)["ndcg@10"] == 1.0
    assert 3 in batch["taken"].tolist()[0]


# -- losses and figures -----------------------------------------------------------------------------------------------


def test_softmax_and_bpr_are_their_formulas_over_items_not_taken(folder):
    task, _, train, _ = settled(folder)
    batch = task.collate(task.encode(train), [0, 4])
    scores, own = torch.randn(2, 9), [3, 8]
    others = [[1, 5, 7, 8], [1, 3, 4, 5, 6, 7]]  # u0 took 2, 4, 6 and 3, "new" 0, 2 and 8
    assert [i for u, i in PAIRS if u == 0] == [2, 4, 6]
    others[0].insert(0, 0)
    softmax = bpr = 0.0
    for row, item, rest in zip(scores, own, others, strict=True):
        softmax += float(F.cross_entropy(row[[item, *rest]][None], torch.tensor([0])))
        bpr -= float(F.logsigmoid(row[item] - row[rest]).mean())
    loss, count = task.loss(scores, batch)
    assert (float(loss), count) == pytest.approx((softmax, 2), rel=1e-5)
    pairwise, *_ = settled(folder, loss="bpr")
    assert float(pairwise.loss(scores, batch)[0]) == pytest.approx(bpr, rel=1e-5)


def test_drawn_negatives_are_scored_beside_the_own_item(folder):
    task, model, train, _ = settled(folder, negatives=5)
    batch = task.augment(task.collate(task.encode(train), [0, 4]))
    drawn, own = batch["drawn"], batch["targets"][:, 0]
    with torch.no_grad():
        few, every = model(batch), model({k: v for k, v in batch.items() if k != "drawn"})
    assert few.shape == (2, 6)
    assert torch.allclose(few[:, 0], every.gather(1, own[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(few[:, 1:], every[:, drawn], atol=1e-6)
    expected = 0.0
    for row, item in enumerate(own.tolist()):
        others = [item, *(j for j in drawn.tolist() if j not in batch["taken"][row].tolist())]
        expected += float(F.cross_entropy(every[row, others][None], torch.tensor([0])))
    assert float(task.loss(few, batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_the_rank_is_among_all_items_not_taken(folder):
    task, _, _train, _ = settled(folder)
    examples = task.encode(table([("new", "i5", 9)]))
    batch = task.collate(examples, [0])
    scores = torch.tensor([[9.0, 0, 8, 7, 1, 5, 5, 2, 9]])  # taken: 0, 2, 8; above i5: i3; as high: i6
    answer = task.answer(scores, batch)[0]
    assert answer[0] == 2.5
    assert answer[1:3].tolist()[0] == 3
    assert task.score(answer[None], examples.targets)["ndcg@10"] == pytest.approx(1 / math.log2(3.5))


def test_popularity_ranks_as_if_everyone_were_recommended_what_is_taken_most(folder):
    task, _, _train, _ = settled(folder)
    counts = torch.bincount(torch.tensor([i for _, i in PAIRS] + [3, 0, 2, 8, 8, 8]), minlength=9).float()
    rows = [("new", "i5", 9), ("u1", "fresh", 9), ("u3", "i0", 9)]
    examples = task.encode(table(rows))
    name, answers = task.constant(examples.targets, 3)
    assert name == "popularity"
    expected = task.answer(counts.expand(3, 9), task.collate(examples, range(3)))[:, 0]
    assert (examples.targets[:, 4] / 2).tolist() == expected.tolist()
    assert task.score(answers, examples.targets)["mrr@10"] == pytest.approx(float((1 / expected).mean()))


def test_parts_add_up_to_the_metric_of_a_kind_of_item(folder):
    task, _, train, _ = settled(folder, few=3)
    task.judge_by("ndcg@10_new")
    examples = task.encode(train)
    answers = torch.zeros(len(train), 9)
    answers[:, 0] = torch.tensor([1.0, 1, 1, 3, 1, 1])
    parts = task.parts(answers, examples.targets)
    assert parts[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    scores = task.score(answers, examples.targets)
    assert (
        float(task.value_of(parts.sum(0))) == pytest.approx((1 / 2 + 1 + 1) / 3) == pytest.approx(scores["ndcg@10_new"])
    )
    assert scores["recall@10_new"] == 1
    assert scores["mrr@10_new"] == pytest.approx((1 / 3 + 1 + 1) / 3)
    few, many = ([name for name in scores if name.endswith(kind)] for kind in ("_few", "_many"))
    assert many == ["ndcg@10_many", "recall@10_many", "mrr@10_many"]
    assert few == []  # "new" has three interactions, so there is none to judge


def test_all_metrics_are_given_of_all_rows_and_by_popularity_and_coldness(folder):
    task, *_ = settled(folder, k=3)
    kinds = ("", "_head", "_tail", "_new", "_many", "_few")
    assert task.metrics == tuple(f"{name}@3{kind}" for kind in kinds for name in ("ndcg", "recall", "mrr"))
    targets = torch.tensor([[0, 1, kind, cold, 2] for kind in range(3) for cold in range(2)])
    scores = task.score(torch.tensor([1.0, 2, 4, 1, 2, 2])[:, None], targets)
    assert {name: value for name, value in scores.items() if name.startswith("recall")} == {
        "recall@3": pytest.approx(5 / 6),
        "recall@3_head": 1,
        "recall@3_tail": 1 / 2,
        "recall@3_new": 1,
        "recall@3_many": pytest.approx(2 / 3),
        "recall@3_few": 1,
    }
    assert scores["mrr@3_head"] == 3 / 4
    assert scores["mrr@3_tail"] == 1 / 2


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_described_task_is_the_same_task(folder):
    task, model, _train, asked = settled(folder)
    description = json.loads(json.dumps(task.describe()))
    again = Recommendation.from_description(description, asked)
    assert again.describe() == task.describe()
    other = again.build(asked)
    other.head.load_state_dict(model.head.state_dict())
    rows = table([("new", "i5", 9), ("u1", "fresh", 9)])
    with torch.no_grad():
        one, two = (
            t.answer(m(b), b) for t, m in ((task, model), (again, other)) for b in [t.collate(t.encode(rows), [0, 1])]
        )
    assert torch.equal(one, two)
    for wrong in ({"taken": {"99": "0"}}, {"new": {"user": ["u0"], "item": []}}, {"settings": {"k": 0}}):
        with pytest.raises((ValueError, TypeError, KeyError, smidgen.core.errors.SmidgenError)):
            Recommendation.from_description({**description, **wrong}, asked)


@torch.no_grad()
def answers(task, model, rows):
    batch = task.collate(task.encode(rows), range(len(rows)))
    return task.answer(model(batch), batch)


def test_what_is_predicted_was_not_taken_before(folder):
    task, model, _, _ = settled(folder, k=3)
    rows = task.table_of(["new", "u1"])
    assert task.check(rows) == {}
    lines = task.predicted(rows, answers(task, model, rows))
    assert [line["user"] for line in lines] == ["new", "u1"]
    assert len(lines[0]["items"]) == 3
    assert not {"i0", "i2", "fresh"} & set(lines[0]["items"])


def test_a_run_learns_new_users_and_its_result_is_the_same_when_loaded(tmp_path):
    draw = random.Random(0)
    rows = [(f"u{u}", f"i{i}", t) for u in range(24) for t, i in enumerate(draw.sample(range(u % 2, 20, 2), 6))]
    known = Known(
        users=tuple(f"u{u}" for u in range(12)),
        items=tuple(f"i{i}" for i in range(20)),
        interactions=torch.tensor([(int(u[1:]), int(i[1:])) for u, i, _ in rows if int(u[1:]) < 12]),
    )
    body = MatrixFactorisation(known, width=8)
    with torch.no_grad():  # a base that knows two tastes
        body.users.weight[:, 0] = torch.tensor([1.0, -1.0]).repeat(6)
        body.items.weight[:, 0] = 3 * torch.tensor([1.0, -1.0]).repeat(10)
    save_recommender(body, tmp_path / "base")
    write_csv(tmp_path / "rows.csv", [row for row in rows if int(row[0][1:]) >= 12], ("user", "item", "time"))
    recipe = {
        "model": str(tmp_path / "base"),
        "data": str(tmp_path / "rows.csv"),
        "task": {"name": "recommendation", "k": 4, "warm_start": "mean"},
        "method": {"name": "lora", "rank": 2},
        "train": {"steps": 30, "batch": 16, "precision": "fp32", "head_learning_rate": 0.1, "evaluate_every": 10},
        "out": str(tmp_path / "out"),
    }
    out = tune(Recipe.model_validate(recipe), resume=False, fresh=False, console=Console(quiet=True))
    report = json.loads((out / "report.json").read_text())
    value = {row["name"]: row["value"] for row in report["rows"]}
    assert value["tuned"] > value["base"]
    assert set(value) == {"popularity", "base", "tuned"}
    tuned = load_result(out)
    held = table([max((row for row in rows if row[0] == f"u{u}"), key=lambda row: row[2]) for u in range(12, 24)])
    tuned.task.rows_for(held, labelled=True)
    found = answers(tuned.task, tuned.model, held)
    assert tuned.task.score(found, tuned.task.encode(held).targets)["ndcg@4"] == pytest.approx(value["tuned"])
    assert torch.equal(tuned.model.body.users.weight, body.users.weight)
    merge(out, tmp_path / "merged", model=None, max_error=0.05, dtype=None, console=Console(quiet=True))
    merged = load_result(tmp_path / "merged")
    assert torch.equal(answers(merged.task, merged.model, held)[:, 0], found[:, 0])
