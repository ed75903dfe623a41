"""Groups, times, weights and encodings of tasks on texts: nothing leaks, rows weigh as said, parts are the whole."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError, RecipeError
from smidgen.data.table import Table
from smidgen.recipes import encode as encode_module
from smidgen.recipes import probing
from smidgen.recipes.encode import Encoder
from smidgen.tasks.base import Asked, Task
from smidgen.tasks.models import locate
from smidgen.tasks.registry import task_named

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import reviews, tiny_bert
from tiny_lm import tiny_lm

COUNT = 40
TEXTS = [text for text, _ in reviews(2 * COUNT)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    bert = tiny_bert(tmp_path_factory.mktemp("bert"))
    t5 = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(t5)
    tokenizer.save_pretrained(t5)
    return {"bert": bert, "t5": t5, "llama": tiny_lm(tmp_path_factory.mktemp("llama"), "llama")}


def rows_of(**columns: Any) -> Table:
    beside = {
        "user": [f"user {i % 8}" for i in range(COUNT)],
        "counts": [i % 4 for i in range(COUNT)],
        "day": [(7 * i) % COUNT for i in range(COUNT)],
    }
    return Table({**columns, **beside}, [f"rows.jsonl:{i + 1}" for i in range(COUNT)])


ROWS = {  # name of the task -> model, rows, settings
    "text_classification": (
        "bert",
        rows_of(text=TEXTS[:COUNT], label=["good" if i % 3 else "bad" for i in range(COUNT)]),
        {},
    ),
    "token_classification": (
        "bert",
        rows_of(
            tokens=[text.split()[: 3 + i % 7] for i, text in enumerate(TEXTS[:COUNT])],
            tags=[
                ["O", "B-X", "I-X", "O", "O", "B-Y", "O", "O", "O"][: len(text.split()[: 3 + i % 7])]
                for i, text in enumerate(TEXTS[:COUNT])
            ],
        ),
        {},
    ),
    "causal_lm": ("llama", rows_of(prompt=TEXTS[:COUNT], completion=TEXTS[COUNT:]), {}),
    "seq2seq": ("t5", rows_of(source=TEXTS[:COUNT], target=TEXTS[COUNT:]), {}),
    "embeddings": ("bert", rows_of(anchor=TEXTS[:COUNT], positive=TEXTS[COUNT:]), {}),
}
BESIDE = ("user", "counts", "day")
SCORED = rows_of(a=TEXTS[:COUNT], b=TEXTS[COUNT:], score=[i % 5 for i in range(COUNT)])
EMBEDDINGS = {
    "contrastive": (None, {}),
    "symmetric": (None, {"symmetric": True}),
    "cosent": (SCORED, {}),
    "cosine": (SCORED, {"loss": "cosine"}),
}


def without_roles(rows: Table) -> dict[str, Any]:
    return {key: list(values) for key, values in rows.columns.items() if key not in BESIDE}


def ready(
    models: dict[str, Path],
    name: str,
    rows: Table | None = None,
    settings: dict[str, Any] | None = None,
    **columns: str,
) -> tuple[Any, Any, Table]:
    model, usual, known = ROWS[name]
    rows, settings = rows or usual, known if settings is None else settings
    kind: type[Task] = task_named(name)
    asked = Asked(model=locate(str(models[model])), plan=Plan(), device=torch.device("cpu"), seed=0, columns=columns)
    task = kind.understand({"train": rows}, kind.Settings(**settings), asked)
    built = task.build(asked)
    task.settle(built, rows, asked)
    return task, built.eval(), rows


@pytest.mark.parametrize("name", ROWS)
def test_rows_encoded_in_parts_and_kept_on_disk_are_those_encoded_together(models, name, tmp_path, monkeypatch):
    task, _, rows = ready(models, name)
    whole = task.encode(rows)
    monkeypatch.setattr(encode_module, "FEW", 9)
    for encoder in (Encoder("off"), Encoder(str(tmp_path)), Encoder(str(tmp_path))):
        examples = encoder(task, rows)
        assert list(examples.inputs) == list(whole.inputs)
        assert torch.equal(examples.targets, whole.targets)
        assert (examples.lengths, examples.truncated) == (whole.lengths, whole.truncated)
        ours, theirs = (task.collate(some, [1, 30, 17]) for some in (examples, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert encoder.done == [("found", COUNT)]


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_one_group_stay_on_one_side(models, name):
    task, _, rows = ready(models, name, group="user")
    kept, held = task.hold_out(rows, 0.25, 0)
    users = rows.column("user")
    assert {users[i] for i in kept}.isdisjoint({users[i] for i in held})
    assert len(held) == 10
    share = "by class, " if "classification" in name else ""
    assert task.split_words == f'{share}seeded, rows of one "user" kept together'
    with pytest.raises(DataError, match='no column "usr"'):
        ready(models, name, group="usr")
    wrong = rows_of(**without_roles(rows))
    wrong.columns["user"][5] = ""
    assert task.check(wrong) == {5: "column \"user\": '' is no group; it must be a name or number"}


@pytest.mark.parametrize("name", ROWS)
def test_the_latest_rows_judge_where_a_column_says_the_time(models, name):
    task, _, rows = ready(models, name, time="day")
    kept, held = task.hold_out(rows, 0.25, 0)
    days = rows.column("day")
    assert sorted(days[i] for i in held) == [*range(30, 40)]
    assert sorted(kept + held) == [*range(COUNT)]
    assert task.split_words == 'as the latest by "day"'
    wrong = rows_of(**without_roles(rows))
    wrong.columns["day"][5] = ""
    assert list(task.check(wrong)) == [5]


def weighted(models, name):
    """The task, all rows, a batch of the first twelve, what these are to weigh, and what the model makes of them."""
    task, model, rows = ready(models, name, weight="counts")
    batch = task.collate(task.encode(rows), range(12))
    weights = torch.tensor([i % 4 for i in range(12)]) / 1.5  # 1 on average of all rows
    torch.testing.assert_close(batch["weights"], weights)
    with torch.no_grad():
        return task, rows, batch, weights, model(batch)


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_a_rows_loss_counts_as_much_as_its_weight(models, name):
    task, rows, batch, weights, outputs = weighted(models, name)
    loss, count = task.loss(outputs, batch)
    torch.testing.assert_close(loss, (outputs["loss"] * weights).sum())
    assert count == int(outputs["tokens"].sum())
    assert torch.equal(task.answer(outputs, batch)[:, 0], outputs["loss"])  # figures count each row once
    wrong = rows_of(**without_roles(rows))
    wrong.columns["counts"][3] = -1
    assert task.check(wrong) == {3: 'column "counts": -1 is no weight; it must be a number of at least 0'}


def test_a_words_loss_counts_as_much_as_its_rows_weight_in_the_probe_too(models):
    task, _, batch, weights, outputs = weighted(models, "token_classification")
    loss, count = task.loss(outputs, batch)
    by_word = weights.repeat_interleave((batch["words"] >= 0).sum(1))
    targets = task.feature_targets(batch)
    expected = (F.cross_entropy(outputs, targets, reduction="none") * by_word).sum()
    torch.testing.assert_close(loss, expected)
    assert count == len(by_word) == len(outputs)
    torch.testing.assert_close(task.feature_weights(batch), by_word)
    lines = {"targets": targets, "weights": by_word}  # as the linear probe gives them
    torch.testing.assert_close(task.loss(outputs, lines)[0], expected)
    assert task.notes == ['Rows count by "counts" in the loss; the figures count each once.']


def test_a_group_or_a_time_stands_for_the_documents_that_were_found(models):
    documents = Table(
        {**ROWS["token_classification"][1].columns, "document": [i // 20 for i in range(COUNT)]},
        ROWS["token_classification"][1].origins,
    )
    task, _, rows = ready(models, "token_classification", documents)
    assert task.groups(rows) == rows.column("document")
    task, _, rows = ready(models, "token_classification", documents, group="user")
    assert task.groups(rows) == rows.column("user")
    assert task.columns.document is None
    with pytest.raises(RecipeError, match="a document beside a group or a time: leave out the document"):
        ready(models, "token_classification", documents, time="day", document="document")


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_loss_of_a_pair_counts_as_much_as_its_weight(models, name):
    rows, settings = EMBEDDINGS[name]
    said = {} if rows is None else {"text": "a", "text_pair": "b", "score": "score"}
    task, model, rows = ready(models, "embeddings", rows, settings, weight="counts", **said)
    batch = task.collate(task.encode(rows), range(12))
    with torch.no_grad():
        vectors = model(batch)

    def loss(weights: Any, some: Any = slice(None)) -> torch.Tensor:
        one = {"targets": batch["targets"][some]} | ({} if weights is None else {"weights": weights})
        total, count = task.loss(vectors[some], one)
        assert count == len(one["targets"])
        return total

    torch.testing.assert_close(batch["weights"], torch.tensor([i % 4 for i in range(12)]) / 1.5)
    plain = loss(None)
    assert plain > 0
    torch.testing.assert_close(loss(torch.ones(12)), plain)
    each = torch.stack([loss(row) for row in torch.eye(12)])
    if name == "cosent":  # a row of weight 2 is the row twice, one of weight 0 is not there
        twice = torch.arange(12).repeat_interleave(torch.arange(12) % 4)
        torch.testing.assert_close(loss(torch.arange(12.0) % 4), loss(None, twice))
        assert each.sum() == 0  # a row alone is in no order
    else:
        torch.testing.assert_close(each.sum(), plain)
        torch.testing.assert_close(loss(batch["weights"]), (each * batch["weights"]).sum())


def test_a_pair_without_weight_in_an_order_has_a_gradient_of_zero(models):
    task, _, _ = ready(models, "embeddings", SCORED, {}, text="a", text_pair="b", score="score")
    vectors = F.normalize(torch.randn(4, 2, 3), dim=-1).requires_grad_()
    batch = {"targets": torch.tensor([1.0, 2, 3, 4]), "weights": torch.tensor([1.0, 0, 2, 1])}
    (gradient,) = torch.autograd.grad(task.loss(vectors, batch)[0], vectors)
    assert gradient[1].abs().max() == 0
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0


def test_rows_with_weights_do_not_share_blocks(models):
    rows = rows_of(text=TEXTS[:COUNT])
    assert ready(models, "causal_lm", rows)[0].packs
    task, _, _ = ready(models, "causal_lm", rows, weight="counts", text="text")
    assert not task.packs
    assert task.encode(rows).weights is not None


def test_the_linear_probe_takes_the_loss_with_its_weights_of_rows_and_classes(models):
    task, _, rows = ready(models, "text_classification", weight="counts")
    task.class_weights = torch.tensor([2.0, 0.5])
    examples = task.encode(rows)
    outputs = torch.randn(COUNT, 2)
    losses = torch.nn.functional.cross_entropy(outputs, examples.targets, reduction="none")
    expected = (losses * task.class_weights[examples.targets] * examples.weights).mean()
    mean_loss = probing._mean_loss(SimpleNamespace(task=task))  # type: ignore[arg-type]
    torch.testing.assert_close(mean_loss(outputs, examples.targets, examples.weights), expected)
    assert mean_loss(outputs, examples.targets, None) != expected
