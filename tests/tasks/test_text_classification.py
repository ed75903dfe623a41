"""Text classification: encoding, losses and metrics against scikit-learn and scipy-free formulas."""

import json
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, ModelError, RecipeError
from smidgen.data.columns import Columns
from smidgen.data.labels import Labels
from smidgen.data.table import Table
from smidgen.tasks.base import Asked
from smidgen.tasks.loading import pooling_for
from smidgen.tasks.models import locate
from smidgen.tasks.text.classifiers import TextClassifier
from smidgen.tasks.text_classification import TextClassification

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def task_of(folder, kind="binary", names=("bad", "good"), pair=None, max_length=16):
    from transformers import AutoTokenizer

    columns = Columns(text="text", text_pair=pair, label="label")
    labels = Labels(kind=kind, names=names)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TextClassification(tokenizer=tokenizer, columns=columns, labels=labels, max_length=max_length)


def table(**columns) -> Table:
    return Table(columns, [f"t.csv:{i + 2}" for i in range(len(columns["text"]))])


def test_a_batch_is_padded_to_its_longest_row_and_masked(folder):
    task = task_of(folder)
    examples = task.encode(table(text=["good", "a very good film", "bad " * 30], label=["good", "good", "bad"]))
    assert examples.targets.tolist() == [1, 1, 0]
    assert examples.lengths == [3, 6, 16]
    assert examples.truncated == 1
    batch = task.collate(examples, [0, 1])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["targets"].tolist() == [1, 1]


def test_pairs_keep_their_token_types(folder):
    task = task_of(folder, pair="other")
    examples = task.encode(table(text=["good"], other=["bad film"], label=["good"]))
    assert examples.inputs[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_bad_rows_are_found_by_number(folder):
    task = task_of(folder)
    problems = task.check(table(text=["good", "", None, "bad"], label=["good", "bad", "bad", "odd"]))
    assert sorted(problems) == [1, 2, 3]
    assert '"odd" is not a class' in problems[3]


def test_losses_are_sums_and_counts(folder):
    outputs, targets = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    loss, count = task_of(folder).loss(outputs, {"targets": targets})
    assert (float(loss), count) == pytest.approx((float(F.cross_entropy(outputs, targets)) * 5, 5))
    several = task_of(folder, "multilabel", ("a", "b", "c"))
    outputs, targets = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
    loss, count = several.loss(outputs, {"targets": targets})
    assert float(loss) / count == pytest.approx(float(F.binary_cross_entropy_with_logits(outputs, targets)))
    number = task_of(folder, "regression", ())
    number.centre, number.spread = 10.0, 2.0
    loss, count = number.loss(torch.tensor([[1.0], [0.0]]), {"targets": torch.tensor([12.0, 14.0])})
    assert (float(loss), count) == (4.0, 2)
    assert number.predictions(torch.tensor([[1.0]])).tolist() == [12.0]


def test_metrics_equal_scikit_learns(folder):
    task = task_of(folder, "multiclass", ("a", "b", "c"))
    targets, answers = torch.randint(3, (60,)), torch.randn(60, 3)
    predictions, scores = answers.argmax(1), task.score(answers, targets)
    assert scores["accuracy"] == pytest.approx(accuracy_score(targets, predictions))
    assert scores["macro_f1"] == pytest.approx(f1_score(targets, predictions, average="macro"))
    assert scores["mcc"] == pytest.approx(matthews_corrcoef(targets, predictions), abs=1e-6)
    several = task_of(folder, "multilabel", ("a", "b", "c"))
    targets, answers = torch.randint(2, (60, 3)), torch.randn(60, 3)
    predictions, scores = (answers > 0).long(), several.score(answers, targets)
    assert scores["macro_f1"] == pytest.approx(f1_score(targets, predictions, average="macro"))
    assert scores["exact_match"] == pytest.approx(accuracy_score(targets, predictions))


def test_a_constant_prediction_ranks_nothing(folder):
    task = task_of(folder, "regression", ())
    scores = task.score(torch.ones(4, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert scores["spearman"] == 0.0
    assert scores["mae"] == pytest.approx(1.5)
    exact = task.score(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([10.0, 20.0, 40.0]))
    assert exact["spearman"] == pytest.approx(1.0, abs=1e-4)


def test_what_is_described_is_read_back(folder):
    task = task_of(folder, "multiclass", ("a", "b", "c"), pair="other")
    asked = Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0)
    again = TextClassification.from_description(json.loads(json.dumps(task.describe())), asked)
    assert again.describe() == task.describe()


@pytest.mark.parametrize(("make", "pooling"), [(tiny_bert, "mean"), (tiny_llama, "last")])
def test_padding_changes_no_answer_and_the_pooling_is_as_documented(make, pooling, tmp_path):
    from transformers import AutoModel

    body = AutoModel.from_pretrained(make(tmp_path))
    model = TextClassifier(body, 3).eval()
    assert model.pooling == pooling
    ids = torch.randint(6, 20, (1, 5))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: F.pad(tensor, (0, 3)) for name, tensor in alone.items()}
    torch.testing.assert_close(model(padded), model(alone), atol=1e-5, rtol=1e-5)
    out = body(**alone, output_hidden_states=True)
    states = torch.cat(
        [out.hidden_states[1], out.last_hidden_state], dim=-1
    )  # two layers: the middle is after the first
    expected = states.mean(1) if pooling == "mean" else states[:, -1]
    torch.testing.assert_close(model.features(alone), expected)


def test_training_leaves_the_bodys_dropout_off_and_the_adapters_on(folder):
    from transformers import AutoModel

    import smidgen

    model = TextClassifier(AutoModel.from_pretrained(folder), 2)
    smidgen.attach(model.body, smidgen.LoRA(rank=2, dropout=0.5, targets="*.query"))
    model.train()
    assert not model.body.training
    assert all(part.training for name, part in model.named_modules() if name.endswith("smidgen.default"))
    model.eval()
    assert not any(part.training for part in model.modules())


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config

    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        pooling_for(T5Config())


def test_the_usual_answer_is_the_majority_or_the_mean(folder):
    name, answers = task_of(folder).constant(torch.tensor([1, 1, 0]), 2)
    assert (name, task_of(folder).predictions(answers).tolist()) == ("majority", [1, 1])
    several = task_of(folder, "multilabel", ("a", "b"))
    _, answers = several.constant(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), 1)
    assert several.predictions(answers).tolist() == [[1, 0]]
    number = task_of(folder, "regression", ())
    number.centre, number.spread = 5.0, 2.0
    name, answers = number.constant(torch.tensor([1.0, 2.0]), 2)
    assert (name, number.predictions(answers).tolist()) == ("mean", [1.5, 1.5])
    assert number.score(answers, torch.tensor([1.0, 2.0]))["mae"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "metric"), [("multiclass", "accuracy"), ("multilabel", "exact_match"), ("regression", "mae")]
)
def test_the_parts_of_a_metric_make_the_metric(folder, kind, metric):
    task = task_of(folder, kind, () if kind == "regression" else ("a", "b", "c"))
    task.judge_by(metric)
    answers = torch.randn(40, task.outputs)
    targets = torch.randn(40) if kind == "regression" else torch.randint(2, (40,) if kind == "multiclass" else (40, 3))
    made = float(task.value_of(task.parts(answers, targets).double().sum(0)))
    assert made == pytest.approx(task.score(answers, targets)[metric], abs=1e-6)


def test_a_metric_that_does_not_fit_is_refused(folder):
    with pytest.raises(RecipeError, match='"mae" is no metric of binary; there are: accuracy, macro_f1, mcc'):
        task_of(folder).judge_by("mae")


def understood(folder, rows, columns, **settings):
    asked = Asked(model=locate(str(folder)), plan=Plan(), device=torch.device("cpu"), seed=0, columns=columns)
    return TextClassification.understand({"train": rows}, TextClassification.Settings(**settings), asked)


def many(**columns):
    texts = [f"{'good' if i % 4 else 'bad'} film number {i}" for i in range(40)]
    return table(text=texts, label=["good" if i % 4 else "bad" for i in range(40)], **columns)


def test_rows_of_one_group_stay_together_and_the_latest_judge_where_a_column_says_so(folder):
    days = [date(2023, 12, 20) + timedelta(days=(i * 7) % 40) for i in range(40)]
    rows = many(user=[f"u{i // 5}" for i in range(40)], day=[day if day.day % 2 else str(day) for day in days])
    task = understood(folder, rows, {"group": "user"})
    kept, held = (set(rows.select(part).column("user")) for part in task.hold_out(rows, 0.25, 0))
    assert held
    assert not kept & held
    task = understood(folder, rows, {"time": "day"})
    assert task.check(rows) == {}
    assert task.hold_out(rows, 0.25, 0)[1] == [i for i in range(40) if days[i] >= date(2024, 1, 19)]
    assert task.split_words == 'as the latest by "day"'


def test_weights_and_balance_say_what_a_row_counts(folder):
    rows = many(weight=[str(1 + i % 2 * 2) for i in range(40)])
    task = understood(folder, rows, {"weight": "weight"}, balance=True)
    task.max_length = 16
    task.learn_from(rows)
    torch.testing.assert_close(task.class_weights, torch.tensor([40 / (2 * 10), 40 / (2 * 30)]))  # bad, good
    examples = task.encode(rows)
    assert examples.weights[:4].tolist() == [0.5, 1.5, 0.5, 1.5]
    batch = task.collate(examples, [0, 1, 2])
    outputs = torch.randn(3, 2)
    losses = F.cross_entropy(outputs, batch["targets"], reduction="none")
    expected = losses * torch.tensor([2.0, 2 / 3, 2 / 3]) * torch.tensor([0.5, 1.5, 0.5])
    loss, count = task.loss(outputs, batch)
    assert (float(loss), count) == (pytest.approx(float(expected.sum())), 3)
    assert "weights" in task.collate(examples.select([0, 5]), [1])


def test_wrong_times_and_weights_are_named_by_row(folder):
    rows = many(weight=["1"] * 39 + ["-2"], day=["2024"] * 20 + ["soon"] + [2024.5] * 19)
    problems = understood(folder, rows, {"weight": "weight", "time": "day"}).check(rows)
    assert problems == {
        20: "column \"day\": 'soon' is no number as the other times; write one",
        39: "column \"weight\": '-2' is no weight; it must be a number of at least 0",
    }
    with pytest.raises(DataError, match="There is no column"):
        understood(folder, rows, {"group": "usr"})
    american = many(day=["12/31/2022", "02/01/2024"] * 20)
    assert understood(folder, american, {"time": "day"}).check(american)[1] == (
        "column \"day\": '02/01/2024' is no date in ISO 8601; write 2024-02-01 or 2024-02-01T09:30:00Z"
    )
    numbers = table(text=[f"a film {i}" for i in range(40)], label=[i / 7 for i in range(40)])
    with pytest.raises(RecipeError, match="balance is for rows of one class each, and the labels are regression"):
        understood(folder, numbers, {}, balance=True)
