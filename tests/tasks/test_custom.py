"""A task of the user's own: pieces or a class, said by file; what is wrong with it is said before anything runs."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError, RecipeError
from smidgen.recipes.load import load_recipe
from smidgen.tasks.base import Asked
from smidgen.tasks.custom import Custom
from smidgen.tasks.models import Located
from smidgen.tasks.own.in_file import task_in_file
from smidgen.tasks.own.maker import CustomModel
from smidgen.tasks.own.rows import Row
from smidgen.tasks.pieces import Pieces, as_batch, wrong_with, wrong_with_model

PAIRS = [(torch.tensor([float(i), 1.0, 0.0]), torch.tensor([2.0 * i, -i])) for i in range(12)]
FILE = """
import torch
from torch import nn
from smidgen.tasks.pieces import Pieces

made = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        made.append(1)
        self.body, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)))

def rows(count, start=0):
    xs = [torch.tensor([i / 10, 1.0, (-1.0) ** i]) for i in range(start, start + count)]
    return [(x, torch.stack([x[0], x[0] * x[2]])) for x in xs]

def make():
    return Pieces(model=Net, train=rows(40), loss=nn.functional.mse_loss, head="out")

def elsewhere():
    return rows(6, 100)
"""


def said(tmp_path: Path, text: str, name: str = "make") -> str:
    """FILE.py:NAME of a new file with this text."""
    file = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
    file.write_text(textwrap.dedent(text))
    return f"{file}:{name}"


def asked(metric: str | None = None, dtype: str | None = None) -> Asked:
    return Asked(
        model=Located("mine", "mine", True),
        plan=Plan(),
        device=torch.device("cpu"),
        seed=0,
        metric=metric,
        dtype=dtype,
    )


def invoked(*arguments: str) -> str:
    """What `smidgen` says, here and where errors go."""
    from typer.testing import CliRunner

    from smidgen.cli.app import app

    done = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, list(arguments))
    assert done.exit_code in (0, 1, 2), done.output
    return done.output


def understood(where: str, metric: str | None = None) -> tuple[Custom, dict]:
    cls = task_in_file(where)
    tables, problems = cls.read(where, cls.Settings())
    assert problems == []
    return cls.understand(tables, cls.Settings(), asked(metric)), tables


def pieces(**changed) -> Pieces:
    return Pieces(**{"model": nn.Linear(3, 2), "train": PAIRS, "loss": F.mse_loss, **changed})


def test_pieces_become_a_task_from_rows_to_figures(tmp_path):
    task, tables = understood(said(tmp_path, FILE))
    assert list(tables) == ["train"]
    assert len(tables["train"]) == 40
    assert tables["train"].where(3) == "train[3]"
    assert task.check(tables["train"]) == {}
    model = task.build(asked())
    assert model.heads == ("out",)
    examples = task.encode(tables["train"])
    batch = task.collate(examples, [3, 1])
    assert batch["inputs"].shape == (2, 3)
    torch.testing.assert_close(batch["targets"], examples.targets[[3, 1]])
    outputs = model(batch)
    total, count = task.loss(outputs, batch)
    assert count == 2
    torch.testing.assert_close(total, 2 * F.mse_loss(outputs, batch["targets"]))
    assert task.metrics == ("loss",)
    assert not task.higher_is_better
    answers = task.answer(outputs, batch).detach()
    assert task.score(answers, batch["targets"]) == {"loss": pytest.approx(total.item() / 2)}
    assert len(task.predicted(tables["train"].select([3, 1]), answers)[0]["output"]) == 2


def test_a_loss_per_row_is_summed_and_its_parts_make_the_metric(tmp_path):
    loss = "lambda said, true: (said - true).square().mean(1)"
    task, tables = understood(said(tmp_path, FILE.replace("nn.functional.mse_loss", loss)))
    model, batch = task.build(asked()), task.collate(task.encode(tables["train"]), range(7))
    outputs = model(batch)
    total, count = task.loss(outputs, batch)
    torch.testing.assert_close(total / count, F.mse_loss(outputs, batch["targets"]))
    parts = task.parts(outputs, batch["targets"])
    assert parts is not None
    assert float(task.value_of(parts.sum(0))) == pytest.approx(task.score(outputs, batch["targets"])["loss"])


def test_the_first_metric_counts_and_those_named_are_better_when_lower(tmp_path):
    metrics = 'metrics={"near": lambda s, t: ((s - t).abs() < 1).float().mean(), "mae": nn.functional.l1_loss}, '
    where = said(tmp_path, FILE.replace("head=", metrics + 'lower_is_better=["mae"], head='))
    task, _ = understood(where)
    assert task.metrics == ("near", "mae", "loss")
    assert (task.metric, task.higher_is_better) == ("near", True)
    task, _ = understood(where, "mae")
    assert not task.higher_is_better
    with pytest.raises(RecipeError, match='"speed" is no metric'):
        understood(where, "speed")


def test_the_model_is_the_same_each_time_and_made_once_where_once_is_enough(tmp_path):
    task, _ = understood(said(tmp_path, FILE))
    first, second = task.build(asked()), task.build(asked())
    assert first.body is not second.body
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    from_module = said(tmp_path, FILE.replace("model=Net", "model=Net()"))
    task, _ = understood(from_module)
    first, second = task.build(asked()), task.build(asked())
    assert first.body is not second.body
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_rows_with_names_are_given_to_the_model_by_name():
    class Two(nn.Linear):
        def forward(self, left, right):
            return super().forward(left * right)

    rows = [{"left": torch.ones(3), "right": torch.ones(3), "targets": 1.0} for _ in range(5)]
    some = pieces(model=Two(3, 1), train=rows, loss=lambda said, true: F.mse_loss(said[:, 0], true))
    assert wrong_with(some) == []
    assert wrong_with_model(some, some.model, "") == []
    assert some.batch(rows)["targets"].dtype == torch.float32  # a Python number is a float64 to torch


def test_data_from_elsewhere_is_named_by_file_too(tmp_path):
    where = said(tmp_path, FILE)
    task, _ = understood(where)
    other = where.replace(":make", ":elsewhere")
    tables, _ = task.read(other, None)
    assert len(tables["train"]) == 6
    assert tables["train"].where(0) == "elsewhere[0]"
    with pytest.raises(DataError, match=r"come from Python; say FILE.py:NAME"):
        task.read("more.csv", None)


def test_rows_without_targets_are_enough_to_predict(tmp_path):
    where = said(tmp_path, FILE + "\n\ndef bare():\n    return [x for x, _ in rows(5)]\n")
    task, _ = understood(where)
    table = task.read(where.replace(":make", ":bare"), None)[0]["train"]
    assert task.check(table)[0] == "it has inputs; the first training row has inputs, targets"
    task.rows_for(table, labelled=False)
    assert task.check(table) == {}
    batch = task.collate(task.encode(table), range(5))
    assert task.build(asked())(batch).shape == (5, 2)


def test_bad_rows_are_named_with_what_is_wrong(tmp_path):
    task, _ = understood(said(tmp_path, FILE))
    nan, short = torch.tensor([float("nan"), 0, 0]), torch.zeros(2)
    bad = [PAIRS[0], (nan, PAIRS[0][1]), (short, PAIRS[0][1]), "row", (PAIRS[0][0],)]
    (tmp_path / "bad.py").write_text("rows = []\n")
    from smidgen.tasks.own.python_file import object_in_file

    object_in_file(f"{tmp_path / 'bad.py'}:rows").extend(bad)
    table = task.read(f"{tmp_path / 'bad.py'}:rows", None)[0]["train"]
    assert task.check(table) == {
        1: "not finite: inputs",
        2: "inputs has the shape (2,); in the first training row it is (3,)",
        3: "ValueError: a str, and neither (x, target) nor a dict of tensors",
        4: "ValueError: a tuple, and neither (x, target) nor a dict of tensors",
    }


def test_all_that_is_wrong_with_pieces_is_said_at_once(tmp_path):
    text = FILE.replace(
        'head="out"', 'valid=[], test=3, metrics={"f1": 3, "loss": max}, lower_is_better=["mae"], collate="no"'
    )
    where = said(tmp_path, text)
    with pytest.raises(RecipeError) as found:
        understood(where)
    assert str(found.value).splitlines() == [
        f"{where} cannot be run:",
        "  valid is empty",
        "  test is a int; it needs a length and rows by number, as a list has them",
        "  collate is a str; it is a function",
        '  metrics["f1"] is a int; it is a function',
        '  metrics has a "loss", which is always there: choose another name',
        '  lower_is_better names "mae", and the metrics are: f1, loss (the loss is known to be)',
    ]


def test_what_fails_on_a_few_rows_is_said_at_once_with_its_line(tmp_path):
    where = said(
        tmp_path,
        """
        import torch
        from torch import nn
        from smidgen.tasks.pieces import Pieces

        def broken(said, true):
            return said[:, 9].mean()

        def make():
            pairs = [(torch.ones(3), torch.ones(2)) for _ in range(5)]
            other = [(torch.ones(4), torch.ones(2)) for _ in range(5)]
            inf = lambda said, true: said.sum() / 0
            return Pieces(model=nn.Linear(3, 2), train=pairs, test=other, loss=inf, metrics={"best": broken}, head="ou")
        """,
    )
    with pytest.raises(RecipeError) as found:
        understood(where)
    message = str(found.value)
    assert 'head names "ou", which the model does not have' in message
    assert "train: loss is" in message
    assert "it is to be finite" in message
    assert 'train: metrics["best"]: IndexError: index 9 is out of bounds' in message
    assert "with size 2 (mine0.py, line 7)" in message
    assert "test: model: RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x4 and 3x2)" in message


def test_outputs_that_cannot_be_judged_are_refused():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    assert wrong_with_model(pieces(model=Mean(3, 2)), Mean(3, 2), "")[0] == (
        "train: model gives outputs of shape () for 4 rows; the first number is to be 4"
    )
    several = nn.LSTM(3, 2, batch_first=True)
    rows = [(torch.ones(5, 3), torch.ones(2)) for _ in range(4)]
    assert "model gives a tuple; the pieces take one tensor" in wrong_with_model(pieces(train=rows), several, "")[0]
    long = [(torch.ones(2 + i // 4, 3), torch.ones(2 + i // 4, 2)) for i in range(8)]
    found = wrong_with_model(pieces(train=long[:4], test=long[4:]), nn.Linear(3, 2), "")
    assert found == [
        "model gives outputs of differing shapes: (N, 2, 2) for train, (N, 3, 2) for test; "
        "let `collate` pad the rows to one length"
    ]
    flat = pieces(loss=lambda said, true: (said - true).abs())
    assert "loss has the shape (4, 2)" in wrong_with_model(flat, flat.model, "")[0]


def test_a_batch_may_be_made_and_disturbed_by_the_users_functions(tmp_path):
    extra = (
        "collate=lambda rows: {'x': torch.stack([r[0] for r in rows]), 'targets': torch.stack([r[1] for r in rows])}, "
    )
    extra += "augment=lambda batch: {**batch, 'x': batch['x'] + torch.randn_like(batch['x'])}, "
    task, tables = understood(said(tmp_path, FILE.replace("head=", extra + "head=")))
    batch = task.collate(task.encode(tables["train"]), [0, 1])
    assert set(batch) == {"x", "targets"}
    torch.manual_seed(3)
    first = task.augment(batch)["x"]
    torch.manual_seed(3)
    torch.testing.assert_close(task.augment(batch)["x"], first)
    assert not torch.equal(first, batch["x"])


def test_rows_of_one_group_stay_on_one_side(tmp_path):
    for groups in ("[i % 8 for i in range(40)]", "torch.arange(40) % 8"):
        task, tables = understood(said(tmp_path, FILE.replace("head=", f"groups={groups}, head=")))
        kept, held = task.hold_out(tables["train"], 0.25, 0)
        assert len(held) == 10
        assert {i % 8 for i in kept}.isdisjoint({i % 8 for i in held})
        again, _ = task.hold_out(tables["train"].select(kept), 0.2, 1)
        assert len(again) == 25  # 5 of the 6 groups that are left
        assert task.split_words == "at random, seeded, rows of one group kept together"
    task, tables = understood(said(tmp_path, FILE))
    assert task.groups(tables["train"]) is None
    assert task.split_words == "at random, seeded"


def test_groups_that_cannot_be_are_named():
    assert wrong_with(pieces(groups=range(12))) == []
    assert wrong_with(pieces(groups=["a"] * 9)) == [
        "groups has 9 values, and train has 12 rows; it has one per row",
    ]
    assert wrong_with(pieces(groups=5)) == ["groups is a int; it is a list, a name or number per row of train"]
    tensors = ["a", *[torch.tensor(i) for i in range(11)]]
    assert wrong_with(pieces(groups=tensors)) == ["groups[1] is a Tensor; it is a name or a number (and 10 more)"]
    assert wrong_with(pieces(groups=[None] + ["a"] * 11)) == ["groups[0] is a NoneType; it is a name or a number"]


def test_what_the_function_returns_has_to_be_pieces(tmp_path):
    with pytest.raises(RecipeError, match=r"returns a list; it is to return smidgen.tasks.pieces.Pieces"):
        understood(said(tmp_path, "def make():\n    return []"))
    with pytest.raises(RecipeError, match=r"KeyError: 'x' \(mine\d.py, line 2\)"):
        understood(said(tmp_path, "def make():\n    return {}['x']"))
    with pytest.raises(ModelError, match=r"model gives a dict; it is to give a torch.nn.Module"):
        understood(said(tmp_path, FILE.replace("model=Net", "model=dict")))
    where = said(tmp_path, FILE)
    cls = task_in_file(where)
    tables, _ = cls.read(where, None)
    with pytest.raises(RecipeError, match=r"the model is as .* makes it; leave it out"):
        cls.understand(tables, None, asked(dtype="bfloat16"))


def test_a_saved_result_tells_its_file_and_does_not_run_it(tmp_path):
    where = said(tmp_path, FILE)
    task, _ = understood(where)
    description = task.describe()
    assert description == {"task": "custom", "file": where, "metric": "loss"}
    with pytest.raises(RecipeError, match=f"is run only if you say so: --task {where}"):
        Custom.from_description(description, asked())
    again = task_in_file(where).from_description(description, asked())
    assert again.metric == "loss"
    with pytest.raises(RecipeError, match="a custom task is said by its file"):
        Custom.read("reviews.csv", None)


def test_a_class_of_ones_own_is_taken_as_it_is(tmp_path):
    text = FILE + textwrap.dedent(
        """
        from smidgen.tasks.custom import Custom

        class Half(Custom):
            def score(self, answers, targets):
                return {"loss": 0.5}

        class Mine(Custom.__bases__[0]):
            summary = "of mine"
        """
    )
    where = said(tmp_path, text, "Half")
    cls = task_in_file(where)
    assert cls.__name__ == "Half"
    assert cls.name == "custom"
    with pytest.raises(RecipeError, match=r"is a Task without build, check, .*, Settings, roles"):
        task_in_file(where.replace(":Half", ":Mine"))
    with pytest.raises(RecipeError, match=r"is the class Net; it is to be a function that returns Pieces, or a class"):
        task_in_file(where.replace(":Half", ":Net"))
    with pytest.raises(RecipeError, match=r"is a list; it is to be a function that returns Pieces, or a class"):
        task_in_file(where.replace(":Half", ":made"))


def test_numbers_and_arrays_become_tensors_and_other_things_are_named():
    import numpy as np

    batch = as_batch({"a": np.zeros(3), "b": 2, "c": torch.ones(2, dtype=torch.float16)})
    assert [t.dtype for t in batch.values()] == [torch.float32, torch.int64, torch.float16]
    with pytest.raises(ValueError, match='"a" is a str, and no tensor or number'):
        as_batch({"a": "text"})


def test_rows_that_change_are_refused_and_equal_rows_are_known_again():
    class Shaken:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.randn(3), torch.zeros(2)

    found = wrong_with_model(pieces(train=Shaken()), nn.Linear(3, 2), "")
    assert found == ["train: row 0 is another each time it is read; what is drawn belongs in `augment`"]
    one, same, other = Row(PAIRS, 1), Row([PAIRS[1]], 0), Row(PAIRS, 2)
    assert repr(one) == repr(same) != repr(other)


def test_recurrent_layers_can_learn_on_gpus():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.dropout = nn.LSTM(3, 4), nn.Dropout(0.5)

    model = CustomModel(Last(), None).train()
    assert model.body.lstm.training
    assert not model.body.dropout.training
    assert not CustomModel(Last(), "lstm").eval().body.lstm.training


def test_a_run_needs_the_file_alone_and_its_result_is_used_with_the_file_said_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(FILE)
    tune = ["tune", "--task", "mine.py:make", "--steps", "6", "--set", "train.evaluate_every=3", "--out", "out/mine"]
    ran = invoked(*tune, "--shift", "elsewhere=mine.py:elsewhere")
    assert "all 4 trained tensors get a finite gradient" in ran  # A and B of the body, weight and bias of the head
    report = json.loads((tmp_path / "out/mine/report.json").read_text())
    assert (report["metric"], report["higher_is_better"]) == ("loss", False)
    assert {row["name"] for row in report["rows"]} == {"base", "tuned"}
    recipe = load_recipe(tmp_path / "out/mine/recipe.yaml")
    assert recipe.task.name == recipe.model.path == recipe.data.train == "mine.py:make"

    use = ["--task", "mine.py:make", "--data", "mine.py:elsewhere"]
    said = json.loads(invoked("evaluate", "out/mine", "--json", *use))
    shift = report["shift"][0]["tuned"]["value"]
    assert said["loss"] == pytest.approx(shift, rel=1e-4)
    lines = [json.loads(line) for line in invoked("predict", "out/mine", *use).splitlines() if line.startswith("{")]
    assert [line["row"] for line in lines] == list(range(6))
    assert "is yours, and how it is saved too" in invoked("merge", "out/mine", "out/merged", "--task", "mine.py:make")


def test_a_result_never_runs_a_file_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "trap.py").write_text(FILE)
    invoked("tune", "--task", "trap.py:make", "--steps", "2", "--out", "out/trap")
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path('run').touch()\n" + FILE)
    for key in [key for key in sys.modules if key.startswith("smidgen_user_trap")]:
        monkeypatch.delitem(sys.modules, key)
    notes = tmp_path / "out/trap/smidgen.json"
    note = notes.read_text()
    for task in ("custom", "trap.py:make", "text_classification"):  # whatever somebody writes into a result
        notes.write_text(note.replace('"task": "custom"', f'"task": "{task}"'))
        said = invoked("predict", "out/trap", "--data", "trap.py:elsewhere")
        assert "error: " in said
        assert not (tmp_path / "run").exists(), said
    notes.write_text(note)
    said = invoked("predict", "out/trap", "--data", "trap.py:elsewhere")
    assert "A file named by a result is not run; where you trust it, say it: --task trap.py:make" in " ".join(
        said.split()
    )
