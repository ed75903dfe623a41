"""A language model tuned end to end on a tiny scale: reported, read again, talked to, merged, read by HF PEFT."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from smidgen.core.errors import DataError
from smidgen.recipes import chat as talking
from smidgen.recipes.save import load_result
from smidgen.recipes.use import merge, predict

from ..tiny_lm import tiny_lm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def talks(tmp_path):
    """Thirty questions whose answer is always a colour, as chat messages."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is the colour of {i}?"},
                {"role": "assistant", "content": ("blue", "red")[i % 2]},
            ]
        }
        for i in range(30)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_chat_model_is_tuned_read_again_and_talks(start, evaluated, model, talks, monkeypatch):
    monkeypatch.setattr(talking, "_SAID", 4)
    run = start(
        task="causal_lm", model=str(model), data=str(talks), train={"steps": 12, "batch": 4, "learning_rate": 0.02}
    )
    assert run.report["metric"] == "perplexity"
    assert run.rows["tuned"]["value"] < run.rows["base"]["value"]
    assert run.rows["tuned"]["value"] == pytest.approx(math.exp(run.rows["tuned"]["others"]["loss"]))
    assert run.rows["base"]["trainable"] == 0
    assert run.plan["rows"] == "chats (messages)"
    assert run.plan["packing"] == "False"
    assert run.plan["lean"] == "7"  # five norms, two feed-forwards
    assert json.loads((run.out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    said = io.StringIO()
    predict(run.out, str(talks), model=None, text=[], out=None, console=Console(file=said, width=1000))
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert len(lines) == 30
    assert lines[3]["prompt"] == "What is the colour of 3?"
    mean = sum(math.log(line["perplexity"]) * line["tokens"] for line in lines) / sum(line["tokens"] for line in lines)
    assert evaluated(run.out, talks)["loss"] == pytest.approx(mean, abs=1e-4)
    said = io.StringIO()
    talking.chat(
        run.out, model=None, base=True, console=Console(file=said, width=100), lines=iter(["What is 1?", "/quit"])
    )
    assert "base" in said.getvalue()
    assert "tuned" in said.getvalue()


def test_the_loss_on_text_of_another_shape_is_told(start, model, talks, tmp_path):
    texts, alpaca = tmp_path / "texts.jsonl", tmp_path / "alpaca.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the colour of {i} is blue"}) + "\n" for i in range(20)))
    rows = [{"instruction": f"Say {i}", "input": "twice", "output": f"{i} {i}"} for i in range(20)]
    alpaca.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(talks), "shift": {"texts": str(texts), "alpaca": str(alpaca)}}
    run = start(task="causal_lm", model=str(model), data=data, train={"learning_rate": 0.02})
    assert run.plan["rows of shift:texts"] == "plain texts (text)"
    assert {row["name"]: row["count"] for row in run.report["shift"]} == {"texts": 20, "alpaca": 20}
    assert all(math.isfinite(row["tuned"]["value"]) for row in run.report["shift"])


def test_rows_of_which_none_can_be_judged_are_refused(start, model, talks, tmp_path):
    far = tmp_path / "far.jsonl"
    far.write_text(json.dumps({"prompt": "what " * 200, "completion": "blue"}) + "\n")
    with pytest.raises(DataError, match=r"nothing is to be judged within \d+ tokens in shift:far \(1 rows\): raise"):
        start(task="causal_lm", model=str(model), data={"train": str(talks), "shift": {"far": str(far)}})


def test_plain_texts_are_tuned_on_in_blocks(start, model, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"the colour of {i} is blue"}) + "\n" for i in range(40)))
    run = start(task="causal_lm", model=str(model), data=str(path), train={"batch": 2, "learning_rate": 0.02})
    assert run.plan["packing"] == "True"
    assert run.plan["max_length"] == "128"
    assert run.plan["padding"] == "23.0% of the tokens"  # four blocks; the last one, nearly empty, is beside a full one
    assert run.rows["tuned"]["value"] < run.rows["base"]["value"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # HF PEFT asks for it
def test_the_adapter_is_read_by_hf_peft_and_merges_into_a_language_model(start, model, talks, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = start(task="causal_lm", model=str(model), data=str(talks), train={"learning_rate": 0.02})
    ids = torch.arange(5, 15)[None]
    ours = load_result(run.out).model.body(ids).logits
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run.out)(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    merge(run.out, tmp_path / "merged", model=None, max_error=0.01, dtype=None, console=Console(file=io.StringIO()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "ia3"])
def test_other_methods_run_too(start, model, talks, method):
    run = start(task="causal_lm", model=str(model), data=str(talks), method=method, train={"steps": 2})
    assert math.isfinite(run.rows["tuned"]["value"])
