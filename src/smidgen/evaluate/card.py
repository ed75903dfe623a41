"""The model card: README.md beside an adapter, with the front matter that the Hugging Face hub reads.

Fields: https://huggingface.co/docs/hub/model-cards (library_name, base_model, pipeline_tag, tags).
"""

import json
import re
from collections.abc import Mapping, Sequence

from smidgen.evaluate.report import Estimate, Report, cut, other_text, sample_texts
from smidgen.evaluate.units import (
    NONE,
    bytes_text,
    difference_text,
    interval_text,
    metric_text,
    seconds_text,
    share_text,
)
from smidgen.evaluate.verdict import described, findings, verdict

PIPELINE_TAGS = {  # task of ours -> pipeline of the hub
    "text_classification": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
    "embeddings": "sentence-similarity",
    "image_classification": "image-classification",
    "object_detection": "object-detection",
}

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(report: Report, *, base_model: str, library_versions: Mapping[str, str], usage: str) -> str:
    """README.md as Markdown.

    base_model: a name on the hub or a folder; a folder is named in the text, not in the front matter.
    usage: Markdown that shows the adapter in use, in Python and in the shell; the caller knows the paths.
    """
    said = verdict(report)
    name = re.split(r"[/\\]", base_model.rstrip("/\\"))[-1]
    versions = ", ".join(f"{_text(package)} {_text(version)}" for package, version in library_versions.items())
    parts = [
        _front_matter(report, base_model),
        f"# {_text(name)} tuned on {_text(report.data)}",
        f"An adapter ({_text(report.method)}) for {_text(base_model)}, trained with smidgen.",
        f"**{_text(said.headline)}** Cost: {said.cost}." + ("" if said.full is None else f" {_text(said.full)}"),
        "## Results",
        _results(report),
        "Brackets are 95 % bootstrap intervals over the test examples.",
        _parts(report),
        _samples(report),
        "## How to use",
        usage.strip(),
        "## Training",
        _table(["setting", "value", "why"], report.plan) if report.plan else "",
        ""
        if report.best_step is None
        else f"The adapter is that of step {report.best_step:,}, the best in validation.",
        f"Versions: {versions}." if versions else "",
        "## Limits",
        f"Judged on test examples of {_text(report.data)} only"
        + (", and on the data below, which it was not trained on." if report.shift else "; other data was not tried."),
        _shift(report),
        "\n".join(f"- {_text(note)}" for note in [*findings(report), *report.notes]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report, base_model: str) -> str:
    on_hub = _HUB_NAME.fullmatch(base_model) is not None
    method = re.split(r"\W", report.method)[0].lower()  # "LoRA(rank=8)" -> "lora"
    tags = [*([f"base_model:adapter:{base_model}"] if on_hub else []), method, "smidgen"]
    lines = ["---", "library_name: peft"]
    lines += [f"base_model: {_quoted(base_model)}"] if on_hub else []
    lines += [f"pipeline_tag: {PIPELINE_TAGS[report.task]}"] if report.task in PIPELINE_TAGS else []
    lines += ["tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"]
    return "\n".join(lines)


def _results(report: Report) -> str:
    others = report.other_metrics()
    names = ["", report.metric, *others, "trained", "share", "peak memory", "time", "on disk"]
    rows = [
        [
            f"{row.name} ({described(report, row.name)})",
            f"{metric_text(report.metric, row.value)} {interval_text(report.metric, row.low, row.high)}",
            *(other_text(row, name) for name in others),
            f"{row.trainable:,}",
            share_text(row.share),
            bytes_text(row.peak_bytes),
            seconds_text(row.seconds),
            bytes_text(row.disk_bytes),
        ]
        for row in report.rows
    ]
    return _table(names, rows)


def _parts(report: Report) -> str:
    metrics, parts = report.part_metrics()
    columns = [(metric, row) for metric in metrics for row in report.rows]
    rows = [[part, *(other_text(row, f"{metric} {part}") for metric, row in columns)] for part in parts]
    return _table(["by part", *(f"{metric} {row.name}" for metric, row in columns)], rows) if rows else ""


def _samples(report: Report) -> str:
    rows = [[cut(text) for text in sample_texts(sample)] for sample in report.samples]
    return _table(["prompt", "truth", "base", "tuned"], rows) if rows else ""


def _shift(report: Report) -> str:
    if not report.shift:
        return ""

    def value(estimate: Estimate | None) -> str:
        if estimate is None:
            return NONE
        interval = interval_text(report.metric, estimate.low, estimate.high)
        return f"{metric_text(report.metric, estimate.value)} {interval}"

    full = ["full"] if report.has_full_shift else []
    rows = [
        [
            row.name,
            f"{row.count:,}",
            value(row.base),
            *(value(row.full) for _ in full),
            value(row.tuned),
            NONE if row.difference is None else difference_text(report.metric, row.difference.value),
        ]
        for row in report.shift
    ]
    return _table(["data", "examples", "base", *full, "tuned", "tuned minus base"], rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(_text(cell) if cell != "---" else cell for cell in line) + " |" for line in lines
    )


def _text(text: str) -> str:
    """Text that Markdown takes as text: on one line, nothing in it starts markup or ends a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    return json.dumps(text)  # a JSON string is a YAML string
