"""Using a result: predict, evaluate on more data, merge into a model that needs smidgen no more."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import DataError, RecipeError
from ..core.files import atomic_directory, atomic_write
from ..core.safe import write_tensors
from ..data.columns import guess_columns
from ..data.read import read
from ..data.table import Problem, Table
from ..evaluate.bootstrap import bootstrap_interval
from ..evaluate.units import interval_text, metric_text
from ..tasks.base import Examples
from ..training.loop import predict as outputs_of
from .prepare import bad_rows_message, best_device, make_accelerator
from .save import HEAD, MERGED, Tuned, load_result

if TYPE_CHECKING:
    from rich.console import Console

_BATCH = 64


def predict(
    adapter: Path, data: str | None, *, model: str | None, text: list[str], out: Path | None, console: "Console"
) -> None:
    """Predictions for texts, or for the rows of a file: as JSON lines on the console, or in `out`.

    Each line has the row's text, the prediction, and for classes the probability of it.
    Raises FolderError, ModelError or DataError.
    """
    tuned = load_result(adapter, model)
    if data is None and not text:
        raise RecipeError("nothing to predict: give --text (again and again) or --data FILE")
    if text:
        column = tuned.task.columns.text
        if tuned.task.columns.text_pair is not None:
            raise RecipeError(
                f'this adapter reads pairs of texts ("{column}", "{tuned.task.columns.text_pair}"): give --data FILE'
            )
        table = Table({column: list(text)}, [f"--text {i + 1}" for i in range(len(text))])
    else:
        table = _rows(tuned, str(data), labelled=False)
    outputs = _outputs(tuned, tuned.task.encode(table))
    predictions = tuned.task.predictions(outputs)
    lines = []
    for i, prediction in enumerate(predictions):
        line: dict[str, Any] = {
            "text": table.column(tuned.task.columns.text)[i],
            "prediction": tuned.task.named(prediction),
        }
        if tuned.task.labels.kind in ("binary", "multiclass"):
            line["probability"] = round(float(outputs[i].softmax(0).max()), 4)
        lines.append(json.dumps(line, ensure_ascii=False))
    if out is not None:
        atomic_write(out, ("\n".join(lines) + "\n").encode())
        console.print(f"{len(lines)} predictions in {out}", highlight=False)
        return
    for each in lines:
        console.print(each, highlight=False, markup=False, soft_wrap=True)


def evaluate(adapter: Path, data: str, *, model: str | None, console: "Console", as_json: bool) -> None:
    """All metrics on labelled rows, the one that counts with its 95 % interval.  Raises as `predict`."""
    tuned = load_result(adapter, model)
    table = _rows(tuned, data, labelled=True)
    task = tuned.task
    examples = task.encode(table)
    targets = examples.targets
    predictions = task.predictions(_outputs(tuned, examples))
    scores = task.score(predictions, targets)
    low, high = bootstrap_interval(
        lambda p, t: task.score(p, t)[task.metric], predictions, targets, seed=0, resamples=300
    )
    if as_json:
        console.print_json(data={"rows": len(table), "metric": task.metric, "low": low, "high": high, **scores})
        return
    for name, value in scores.items():
        interval = f"  {interval_text(name, low, high)}" if name == task.metric else ""
        console.print(f"{name:12} {metric_text(name, value)}{interval}", highlight=False, markup=False)
    console.print(f"on {len(table):,} rows of {data}", highlight=False)


def merge(
    adapter: Path, out: Path, *, model: str | None, max_error: float, dtype: str | None, console: "Console"
) -> None:
    """Write the base with the adapter merged into it as a plain transformers folder, with the head beside it.

    Raises NotMergeable, MergeError or RecipeError, and then has written nothing.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RecipeError(f"{out} is there already: choose another --out")
    tuned = load_result(adapter, model, dtype)
    if tuned.adapters is None:
        raise RecipeError(f"{adapter} is merged already: AutoModel.from_pretrained reads it")
    report = tuned.adapters.merge(max_error=max_error)
    body: Any = tuned.model.body
    with atomic_directory(out) as new:
        body.save_pretrained(new)
        tuned.task.tokenizer.save_pretrained(new)
        write_tensors(new / HEAD, {name: p.detach() for name, p in tuned.model.head.named_parameters()})
        note = json.dumps({"format": 1, "task": tuned.task.describe()}, indent=2, sort_keys=True)
        (new / MERGED).write_text(note, encoding="utf-8")
    console.print(
        f"{report}\nMerged model in {out}: AutoModel.from_pretrained reads it, {HEAD} is the task's head; "
        "`smidgen predict` uses both",
        highlight=False,
    )


def _outputs(tuned: Tuned, examples: Examples) -> torch.Tensor:
    device = best_device()
    return outputs_of(tuned.model.to(device), tuned.task, examples, make_accelerator(device), _BATCH)


def _rows(tuned: Tuned, data: str, *, labelled: bool) -> Table:
    """The rows of a file under the columns that the adapter was trained with; found anew where they
    have other names.
    """
    table, problems = read(data)
    task = tuned.task
    wanted = [task.columns.text, *filter(None, [task.columns.text_pair, task.columns.label if labelled else None])]
    if any(name not in table.columns for name in wanted):
        task.columns = guess_columns(table, allow_unlabelled=not labelled)
    if not labelled and task.columns.label is not None:
        import dataclasses

        task.columns = dataclasses.replace(task.columns, label=None)
    problems += [Problem(table.where(i), what) for i, what in task.check(table).items()]
    if problems:
        raise DataError(bad_rows_message(problems, len(table)))
    return table
