"""The result of a run as one folder, written whole or not at all, and read again for predicting.

adapter_config.json, adapter_model.safetensors, smidgen.json   the adapter of the body (formats/)
head.safetensors                                               the task's head, if it has one
recipe.yaml, report.json, report.html, README.md               what was run, what it came to
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import AdapterSet, load
from ..auto.plan import Plan
from ..core.errors import FolderError, ModelError, RecipeError
from ..core.files import atomic_directory
from ..core.safe import read_json, read_tensors, write_tensors
from ..evaluate.card import model_card
from ..evaluate.report import Report
from ..tasks.base import Asked, Task, TaskModel
from ..tasks.custom import Custom
from ..tasks.loading import hold_as_asked
from ..tasks.models import Located, locate
from ..tasks.own.in_file import brings_model_and_data
from ..tasks.own.python_file import names_file
from ..tasks.registry import task_named, task_said
from .prepare import Work
from .schema import TaskPart

if TYPE_CHECKING:
    from .schema import Recipe

HEAD = "head.safetensors"
MERGED = "task.json"  # of a merged model: its task, as in an adapter's smidgen.json
_RESULT = ("adapter_model.safetensors", HEAD)  # what it takes to use the result, next to the base


def save_result(
    out: Path, work: Work, adapters: AdapterSet, report: Report, recipe: "Recipe", *, replace: bool
) -> Report:
    """Write the folder; returns the report with the true size of the tuned row."""
    with atomic_directory(out, replace=replace) as new:
        extra = {
            "task": work.task.describe(),
            "settings": dict(recipe.task.settings),
            "base_model": work.asked.model.name,
            "dtype": recipe.model.dtype,
            "revision": recipe.model.revision,
            "quantize": recipe.model.quantize,
        }
        adapters.save(
            new / "adapter",
            base_model=work.asked.model.name,
            task_type=work.task.peft_task_type,
            extra=extra,
        )
        for file in (new / "adapter").iterdir():
            file.rename(new / file.name)
        (new / "adapter").rmdir()
        write_tensors(new / HEAD, {name: p.detach().cpu() for name, p in work.model.head.named_parameters()})
        size = sum((new / name).stat().st_size for name in _RESULT)
        rows = tuple(dataclasses.replace(row, disk_bytes=size) if row.name == "tuned" else row for row in report.rows)
        report = dataclasses.replace(report, rows=rows)
        report.save(new)
        (new / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        usage = _usage(out, work)
        card = model_card(report, base_model=work.asked.model.name, library_versions=report.versions, usage=usage)
        (new / "README.md").write_text(card, encoding="utf-8")
    return report


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A result loaded again.   settings: of its task, as its recipe said them."""

    model: TaskModel
    task: Task
    settings: Any
    adapters: AdapterSet | None  # None: merged into the body
    located: Located


def load_result(
    folder: Path, model: str | None = None, dtype: str | None = None, task_file: str | None = None
) -> Tuned:
    """Load base, adapter and head, or a merged model.   model: where the base is now, if not where it was.

    task_file: FILE.py:NAME of a task of the user's own, which is run only if they say so here.
    Raises FolderError, ModelError or RecipeError saying what is missing.
    """
    merged = (folder / MERGED).is_file()
    extra = {**read_json(folder / MERGED), "base_model": str(folder)} if merged else _extra(folder)
    said = {key: extra.get(key) for key in ("base_model", "dtype", "revision", "quantize")}
    if not all(value is None or isinstance(value, str) for value in said.values()):
        raise FolderError(f"{folder / 'smidgen.json'} names its base model in no words: {said}")
    revision = said["revision"] if model is None else None
    if model is None and task_file is not None and brings_model_and_data(task_file):
        model = task_file
    description = dict(_mapping(extra, "task", folder))
    if task_file is None and description.get("task") == Custom.name:
        file = description.get("file", "FILE.py:NAME")
        raise RecipeError(
            f"{folder} was made with {file}. A file named by a result is not run; where you trust it, say "
            f"it: --task {file}"
        )
    asked = Asked(
        model=dataclasses.replace(_base(folder, model, said["base_model"] or ""), quantize=said["quantize"]),
        plan=Plan(),
        device=torch.device("cpu"),
        seed=0,
        dtype=dtype or said["dtype"],
        revision=revision,
    )
    try:
        name = task_file or task_named(str(description["task"])).name
        settings = TaskPart(name=name, **(extra.get("settings") or {})).build()
        task = task_said(name).from_description(description, asked)
    except RecipeError as error:
        hint = "" if task_file else ". A task in a file of yours is said again: --task FILE.py:NAME"
        raise FolderError(f"{folder}: {str(error).rstrip('.')}{hint}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(
            f"{folder / 'smidgen.json'} describes its task in a way that is not known: {error!r}"
        ) from error
    whole = task.build(asked)
    hold_as_asked(whole.body, asked.model)
    adapters = None if merged else load(whole.body, folder)
    head = read_tensors(folder / HEAD)
    needed = {name: tuple(p.shape) for name, p in whole.head.named_parameters()}
    found = {name: tuple(t.shape) for name, t in head.items()}
    if needed != found or not all(bool(torch.isfinite(t).all()) for t in head.values()):
        raise FolderError(
            f"{folder / HEAD} holds {found}, finite numbers of {needed} are needed: it belongs to another adapter"
        )
    whole.head.load_state_dict(head, strict=False)
    return Tuned(whole.eval(), task, settings, adapters, asked.model)


def _base(folder: Path, said: str | None, saved: str) -> Located:
    """The base model, where the user says it is, else where it was."""
    if said is None and names_file(saved):
        raise ModelError(
            f"{folder} was trained on a model that {saved} makes. A file named by a result is not run; where you trust "
            f"it, say it: --model {saved}"
        )
    try:
        return locate(said or saved)
    except ModelError as error:
        hint = "" if said else ". Say where the base model is now: --model FOLDER"
        raise ModelError(f"{folder} was trained on {saved}: {error}{hint}") from error


def is_result(folder: Path) -> bool:
    """True if the folder holds a finished run."""
    return not _missing(folder)


def _missing(folder: Path) -> list[str]:
    return [name for name in ("adapter_config.json", HEAD, "smidgen.json") if not (folder / name).is_file()]


def _extra(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise FolderError(f"{folder} {what}; a result of `smidgen tune` is a folder")
    if missing := _missing(folder):
        raise FolderError(
            f"{folder} is no result of `smidgen tune`: it has no {' and no '.join(missing)}. "
            "An adapter of another origin: smidgen.load(model, folder)"
        )
    return _mapping(read_json(folder / "smidgen.json"), "extra", folder)


def _mapping(value: Mapping[str, Any], key: str, folder: Path) -> Mapping[str, Any]:
    found = value.get(key)
    if not isinstance(found, dict):
        raise FolderError(f'{folder / "smidgen.json"} has no "{key}": the adapter was not saved by `smidgen tune`')
    return found


def _usage(out: Path, work: Work) -> str:
    loading = ""
    if not work.asked.model.is_made and hasattr(work.model.body, "config"):
        located, kind = work.asked.model, type(work.model.body).__name__
        loading = f"""

```python
from transformers import {kind}
import smidgen

body = {kind}.from_pretrained("{located.source if not located.is_local else "<the base model>"}")
adapters = smidgen.load(body, "{out.name}")  # the head is head.safetensors; `smidgen predict` applies both
```

Where Hugging Face PEFT has the method, `PeftModel.from_pretrained(body, ...)` loads the folder onto the same body."""
    name = work.recipe.task.name
    rest = f"--task {name} --data FILE.py:NAME" if brings_model_and_data(name) else "--data more.csv"
    if names_file(name) and not brings_model_and_data(name):
        rest = f"--task {name} {rest}"
    return f"""```shell
smidgen predict {out} {rest}
smidgen evaluate {out} {rest}
```{loading}"""
