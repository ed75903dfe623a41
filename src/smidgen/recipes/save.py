"""The result of a run as one folder, written whole or not at all, and read again for predicting.

adapter_config.json, adapter_model.safetensors, smidgen.json   the adapter of the body (formats/)
head.safetensors                                               the task's head: weight (K, 2 D), bias (K,)
recipe.yaml, report.json, report.html, README.md               what was run, what it came to
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import AdapterSet, load
from ..core.errors import FolderError, ModelError, RecipeError
from ..core.files import atomic_directory
from ..core.safe import read_json, read_tensors, write_tensors
from ..evaluate.card import model_card
from ..evaluate.report import Report
from ..tasks.models import Located, locate
from ..tasks.text_classification import TextClassification, TextClassifier
from .prepare import Work, load_body, load_tokenizer

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
            "base_model": work.located.name,
            "dtype": recipe.model.dtype,
            "revision": recipe.model.revision,
        }
        adapters.save(new / "adapter", base_model=work.located.name, task_type="FEATURE_EXTRACTION", extra=extra)
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
        card = model_card(report, base_model=work.located.name, library_versions=report.versions, usage=usage)
        (new / "README.md").write_text(card, encoding="utf-8")
    return report


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A result loaded again."""

    model: TextClassifier
    task: TextClassification
    adapters: AdapterSet | None  # None: merged into the body
    located: Located


def load_result(folder: Path, model: str | None = None, dtype: str | None = None) -> Tuned:
    """Load base, adapter and head, or a merged model.   model: where the base is now, if not where it was.

    Raises FolderError or ModelError saying what is missing.
    """
    merged = (folder / MERGED).is_file()
    extra = {**read_json(folder / MERGED), "base_model": str(folder)} if merged else _extra(folder)
    said = {key: extra.get(key) for key in ("base_model", "dtype", "revision")}
    if not all(value is None or isinstance(value, str) for value in said.values()):
        raise FolderError(f"{folder / 'smidgen.json'} names its base model in no words: {said}")
    revision = said["revision"] if model is None else None
    try:
        located = locate(model or said["base_model"] or "")
    except ModelError as error:
        hint = "" if model else ". Say where the base model is now: --model FOLDER"
        raise ModelError(f"{folder} was trained on {said['base_model']}: {error}{hint}") from error
    tokenizer = load_tokenizer(located, revision)
    try:
        task = TextClassification.from_description(dict(_mapping(extra, "task", folder)), tokenizer)
    except (KeyError, TypeError, ValueError, RecipeError) as error:
        raise FolderError(
            f"{folder / 'smidgen.json'} describes its task in a way that is not known: {error!r}"
        ) from error
    body = load_body(located, dtype or said["dtype"], revision)
    adapters = None if merged else load(body, folder)
    head = read_tensors(folder / HEAD)
    classifier = TextClassifier(body, task.outputs)
    needed = {name: tuple(p.shape) for name, p in classifier.head.named_parameters()}
    found = {name: tuple(t.shape) for name, t in head.items()}
    if needed != found or not all(bool(torch.isfinite(t).all()) for t in head.values()):
        raise FolderError(
            f"{folder / HEAD} holds {found}, finite numbers of {needed} are needed: it belongs to another adapter"
        )
    classifier.head.load_state_dict(head)
    return Tuned(classifier.eval(), task, adapters, located)


def is_result(folder: Path) -> bool:
    """True if the folder holds a finished run."""
    return not _missing(folder)


def _missing(folder: Path) -> list[str]:
    return [name for name in ("adapter_config.json", HEAD, "smidgen.json") if not (folder / name).is_file()]


def _extra(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise FolderError(f"{folder} is not there; a result of `smidgen tune` is a folder")
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
    return f"""```shell
smidgen predict {out} --text "..."
smidgen evaluate {out} --data more.csv
```

```python
from transformers import AutoModel
import smidgen

body = AutoModel.from_pretrained("{work.located.source if not work.located.is_local else "<the base model>"}")
adapters = smidgen.load(body, "{out.name}")  # the head is head.safetensors; `smidgen predict` applies both
```

Where Hugging Face PEFT has the method, `PeftModel.from_pretrained(body, ...)` loads the folder onto the same body."""
