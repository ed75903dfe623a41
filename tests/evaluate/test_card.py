"""The card carries the front matter that the hub reads, and the same figures as the report."""

from dataclasses import replace
from typing import Any

import yaml

from smidgen.evaluate.card import model_card
from smidgen.evaluate.report import Report

USAGE = "```python\nadapters = smidgen.load(model, 'out')\n```\n\n```shell\nsmidgen predict out\n```"


def card(report: Report, base_model: str = "prajjwal1/bert-mini") -> tuple[dict[str, Any], str]:
    text = model_card(report, base_model=base_model, library_versions={"torch": "2.13.0"}, usage=USAGE)
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_that_of_an_adapter_on_the_hub(binary: Report) -> None:
    front, _ = card(binary)
    assert front == {
        "library_name": "peft",
        "base_model": "prajjwal1/bert-mini",
        "pipeline_tag": "text-classification",
        "tags": ["base_model:adapter:prajjwal1/bert-mini", "lora", "smidgen"],
    }


def test_a_folder_is_no_base_model_on_the_hub(binary: Report) -> None:
    front, body = card(binary, base_model="/models/bert-mini/")
    assert "base_model" not in front
    assert "# bert-mini tuned on reviews.jsonl" in body


def test_an_unknown_task_has_no_pipeline_tag(binary: Report) -> None:
    front, _ = card(replace(binary, task="recommendation"))
    assert "pipeline_tag" not in front


def test_the_card_says_results_use_training_and_limits(binary: Report) -> None:
    _, body = card(binary)
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        *("## Results", "## How to use", "## Training", "## Limits")
    ]
    assert r"| tuned (LoRA(rank=8)) | 84.1 % \[82.5, 85.7\] | 84.0 % | 0.682 | 34,562 | 0.31 % |" in body
    assert USAGE in body
    assert "| rank | 8 | usual for a model of this size |" in body
    assert "On tweets tuned is worse than the linear probe" in body
    assert "torch 2.13.0" in body


def test_examples_of_the_data_stay_out_of_the_card(binary: Report) -> None:
    assert not any(example.text in card(binary)[1] for example in binary.examples)


def test_text_cannot_break_the_table_or_the_front_matter(binary: Report) -> None:
    shift = (replace(binary.shift[0], name="a|b\n<script>"),)
    front, body = card(replace(binary, shift=shift, method='x"\n---\nevil: 1'), base_model='a"b\nc: d')
    assert front.keys() == {"library_name", "pipeline_tag", "tags"}
    assert r"| a\|b \<script\> | 4,200 |" in body
