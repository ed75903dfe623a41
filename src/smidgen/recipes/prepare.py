"""From a recipe to everything a run needs: rows read, checked and split, the task understood, the model loaded.

Nothing here takes long, and whatever is wrong with data or model is found here, before any training.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..auto.plan import Plan, choose_max_length
from ..core.errors import DataError, ModelError, RecipeError
from ..core.prompt_method import PromptMethod
from ..data.columns import guess_columns
from ..data.labels import understand_labels
from ..data.read import read, read_splits
from ..data.split import duplicate_groups, split, subset
from ..data.table import Problem, Table
from ..tasks.base import Examples
from ..tasks.models import Located, locate
from ..tasks.text_classification import TextClassification, TextClassifier
from .schema import DataPart, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

_TEST_SHARE, _MOST_TEST = 0.2, 2000
_VALID_SHARE, _MOST_VALID = 0.1, 500
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHOWN = 20  # bad rows in one message
_SAMPLE = 2000  # texts measured for their length


@dataclass
class Data:
    """The rows of a run by part, and what is to be said about them."""

    train: Table
    valid: Table
    test: Table
    shift: dict[str, Table]
    notes: list[str]


@dataclass
class Work:
    """Everything a run works on."""

    recipe: Recipe
    located: Located
    tokenizer: "PreTrainedTokenizerBase"
    model: TextClassifier
    task: TextClassification
    data: Data
    train: Examples
    valid: Examples
    test: Examples
    shift: dict[str, Examples]
    total_parameters: int  # of body and head

    def cut(self, max_length: int) -> None:
        """Encode all rows anew with a smaller maximal length."""
        self.task.max_length = max_length
        self.train, self.valid, self.test = map(self.task.encode, (self.data.train, self.data.valid, self.data.test))
        self.shift = {name: self.task.encode(table) for name, table in self.data.shift.items()}


def prepare(recipe: Recipe, plan: Plan, device: torch.device, seed: int) -> Work:
    """Read, check, split, load.  Raises DataError, ModelError or RecipeError naming all that is wrong."""
    if recipe.task.name != TextClassification.name:
        raise RecipeError(f'there is no task "{recipe.task.name}"; there is: {TextClassification.name}')
    located = locate(recipe.model.path)  # first: a wrong name is found in milliseconds
    given, problems = _read(recipe.data)
    columns = guess_columns(
        given["train"], text=recipe.data.text, text_pair=recipe.data.text_pair, label=recipe.data.label
    )
    for role, why in columns.reasons.items():
        plan.decide(f"{role} column", None, getattr(columns, role), why)
    assert columns.label is not None
    labels = understand_labels(given["train"].column(columns.label), kind=recipe.task.kind)
    plan.decide("kind", None, labels.kind, labels.reason)

    tokenizer = load_tokenizer(located, recipe.model.revision)
    task = TextClassification(tokenizer=tokenizer, columns=columns, labels=labels, max_length=0)
    if recipe.report.metric is not None:
        task.judge_by(recipe.report.metric)
    plan.decide(
        "metric", recipe.report.metric, task.metric, "usual for this kind; picks the best step, and is compared"
    )
    notes = list(labels.notes)
    checked: dict[str, Table] = {}
    for name, table in given.items():
        bad = task.check(table)
        if name == "train":
            bad = {**{i: f'column "{columns.label}": {what}' for i, what in labels.problems.items()}, **bad}
        problems += [Problem(table.where(i), what) for i, what in sorted(bad.items())]
        checked[name] = table.select([i for i in range(len(table)) if i not in bad])
    if problems:
        if recipe.data.on_bad_row == "fail":
            raise DataError(bad_rows_message(problems, sum(map(len, given.values()))))
        notes.append(
            f"{len(problems)} bad rows were left out: "
            + "; ".join(map(str, problems[:3]))
            + (" ..." if len(problems) > 3 else "")
        )
    data = _divide(checked, task, plan, seed, notes)

    body = load_body(located, recipe.model.dtype, recipe.model.revision).to(device)
    config: Any = body.config
    sample = subset(len(data.train), None, _SAMPLE, seed)
    limit = min(getattr(config, "max_position_embeddings", 1 << 20) or 1 << 20, tokenizer.model_max_length)
    method = recipe.method_object()
    prompt = method.length if isinstance(method, PromptMethod) else 0  # virtual tokens take positions too
    limit -= prompt
    length, why = choose_max_length(_lengths(task, data.train, sample), int(limit), device)
    task.max_length = plan.decide("max_length", recipe.task.max_length, length, why)
    if task.max_length > limit:
        taken = f" beside a prompt of {prompt}" if prompt else ""
        raise RecipeError(f"task.max_length is {task.max_length}, and {located.name} has {limit} positions{taken}")
    train = task.encode(data.train)
    if labels.kind == "regression":
        task.centre, task.spread = float(train.targets.mean()), max(float(train.targets.std(correction=0)), 1e-6)
    torch.manual_seed(seed)  # of the new head
    model = TextClassifier(body, task.outputs).to(device)
    return Work(
        recipe=recipe,
        located=located,
        tokenizer=tokenizer,
        model=model,
        task=task,
        data=data,
        train=train,
        valid=task.encode(data.valid),
        test=task.encode(data.test),
        shift={name: task.encode(table) for name, table in data.shift.items()},
        total_parameters=sum(p.numel() for p in model.parameters()),
    )


def load_tokenizer(located: Located, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The model's own tokenizer, with a padding token.  Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(located.source, revision=revision or "main")
    except Exception as error:
        raise ModelError(f"the tokenizer of {located.name} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoders have none; padding is masked anyway
    tokenizer.padding_side = "right"
    return tokenizer


def load_body(
    located: Located, dtype: str | None = None, revision: str | None = None, *, with_head: bool = False
) -> nn.Module:
    """The pre-trained model in fp32 unless told otherwise; with the head that it was saved with, or without.

    Raises ModelError.
    """
    if dtype not in (None, *_DTYPES):
        raise ModelError(f'"{dtype}" is no dtype for a model; there are: {", ".join(_DTYPES)}')
    import transformers
    from transformers.utils import logging

    # what it says about heads that are not loaded is as it should be
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        kind: Any = transformers.AutoModel
        if with_head:
            config = transformers.AutoConfig.from_pretrained(located.source, revision=revision or "main")
            kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        body: nn.Module = kind.from_pretrained(
            located.source, dtype=dtype or "float32", revision=revision or "main", use_safetensors=True
        )
    except Exception as error:
        raise ModelError(f"{located.name} cannot be loaded: {_first_line(error)}") from error
    return body


def set_threads(said: int | None) -> int:
    """Use as many threads as there are cores for this process, unless told; under torchrun what it set."""
    if said is None and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cores)
    elif said is not None:
        torch.set_num_threads(said)
    return torch.get_num_threads()


def best_device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def make_accelerator(device: torch.device, precision: str = "fp32") -> "Accelerator":
    """accelerate's handle on device, processes and precision ("fp32" or "bf16")."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it is shared, and an earlier run in this process may have had another precision
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")


def _read(data: DataPart) -> tuple[dict[str, Table], list[Problem]]:
    """All tables by name: train, valid, test, and "shift:NAME"."""
    parts, problems = read_splits(data.train)
    tables: dict[str, Table] = {}
    if "train" not in parts:
        raise DataError(f"{data.train} has no training rows; it has {', '.join(parts)}")
    tables.update({str(name): table for name, table in parts.items()})
    named = {"valid": data.valid, "test": data.test} | {f"shift:{name}": where for name, where in data.shift.items()}
    for name, where in named.items():
        if where is not None:
            tables[name], bad = read(where)
            problems += bad
    return tables, problems


def _divide(tables: dict[str, Table], task: TextClassification, plan: Plan, seed: int, notes: list[str]) -> Data:
    """Training, validation and test rows; what is not given is held out of the training rows."""
    train, valid, test = tables["train"], tables.get("valid"), tables.get("test")
    if test is None and valid is not None:
        test, valid = valid, None
        plan.decide(
            "test rows",
            None,
            len(test),
            "your validation rows judge the result; another part of training picks the best step",
        )
    if test is None:
        train, test = _hold_out(train, task, min(_TEST_SHARE, _MOST_TEST / len(train)), seed)
        plan.decide("test rows", None, len(test), "held out of your data by class, seeded, equal texts kept together")
    else:
        plan.decide("test rows", None, len(test), "given")
    if valid is None:
        train, valid = _hold_out(train, task, min(_VALID_SHARE, _MOST_VALID / len(train)), seed + 1)
        plan.decide(
            "validation rows",
            None,
            len(valid),
            "held out of the training rows; they pick the best step, the test rows judge it",
        )
    else:
        plan.decide("validation rows", None, len(valid), "given")
    plan.decide("training rows", None, len(train), "the rest")
    seen = set(train.column(task.columns.text))
    again = sum(text in seen for text in test.column(task.columns.text))
    if again and task.columns.text_pair is None:
        notes.append(
            f"{again} of {len(test)} test texts stand in the training rows too: the figures are flattered by that much"
        )
    shift = {name.removeprefix("shift:"): table for name, table in tables.items() if name.startswith("shift:")}
    return Data(train, valid, test, shift, notes)


def _hold_out(table: Table, task: TextClassification, fraction: float, seed: int) -> tuple[Table, Table]:
    label, text = task.columns.label, task.columns.text
    assert label is not None
    labels: Sequence[Any] = table.column(label)
    if task.labels.kind == "regression":
        labels = [float(task.labels.encode(value)) for value in labels]  # type: ignore[arg-type]
    elif task.labels.kind == "multilabel":
        labels = [str(value) for value in labels]
    kept, held = split(
        len(table), labels=labels, groups=duplicate_groups(table.column(text)), fraction=fraction, seed=seed
    )
    return table.select(kept), table.select(held)


def _lengths(task: TextClassification, table: Table, rows: Sequence[int]) -> list[int]:
    some = table.select(rows)
    pairs = some.column(task.columns.text_pair) if task.columns.text_pair else None
    tokenizer: Any = task.tokenizer
    return [len(ids) for ids in tokenizer(some.column(task.columns.text), pairs, verbose=False)["input_ids"]]


def bad_rows_message(problems: list[Problem], rows: int) -> str:
    """All bad rows in one message, the first of them named."""
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    advice = "Mend them, or leave them out with --on-bad-row skip"
    return f"{len(problems)} of {rows:,} rows cannot be used:\n{shown}{more}\n{advice}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
