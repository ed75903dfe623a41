"""Groups, weights and encodings of all tasks on texts: nothing leaks, rows weigh what they say, parts are the whole."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smidgen.auto.plan import Plan
from smidgen.core.errors import DataError
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
    beside = {"user": [f"user {i % 8}" for i in range(COUNT)], "counts": [i % 4 for i in range(COUNT)]}
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


def ready(models: dict[str, Path], name: str, rows: Table | None = None, **columns: str) -> tuple[Any, Any, Table]:
    model, usual, settings = ROWS[name]
    rows = rows or usual
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


@pytest.mark.parametrize("name", ["text_classification", "causal_lm", "seq2seq", "embeddings"])
def test_rows_of_one_group_stay_on_one_side(models, name):
    task, _, rows = ready(models, name, group="user")
    kept, held = task.hold_out(rows, 0.25, 0)
    users = rows.column("user")
    assert {users[i] for i in kept}.isdisjoint({users[i] for i in held})
    assert len(held) == 10
    share = "by class, " if name == "text_classification" else ""
    assert task.split_words == f'{share}seeded, rows of one "user" kept together'
    with pytest.raises(DataError, match='no column "usr"'):
        ready(models, name, group="usr")
    wrong = rows_of(**{key: values for key, values in rows.columns.items() if key not in ("user", "counts")})
    wrong.columns["user"][5] = ""
    assert task.check(wrong) == {5: "column \"user\": '' is no group; it must be a name or number"}


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq"])
def test_a_rows_loss_counts_as_much_as_its_weight(models, name):
    task, model, rows = ready(models, name, weight="counts")
    batch = task.collate(task.encode(rows), range(12))
    weights = torch.tensor([i % 4 for i in range(12)]) / 1.5  # 1 on average of all rows
    torch.testing.assert_close(batch["weights"], weights)
    with torch.no_grad():
        outputs = model(batch)
        loss, count = task.loss(outputs, batch)
    torch.testing.assert_close(loss, (outputs["loss"] * weights).sum())
    assert count == int(outputs["tokens"].sum())
    assert torch.equal(task.answer(outputs, batch)[:, 0], outputs["loss"])  # figures count each row once
    wrong = rows_of(**{key: values for key, values in rows.columns.items() if key not in ("user", "counts")})
    wrong.columns["counts"][3] = -1
    assert task.check(wrong) == {3: 'column "counts": -1 is no weight; it must be a number of at least 0'}


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
