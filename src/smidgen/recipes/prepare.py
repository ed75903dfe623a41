"""From a recipe to everything a run needs: rows read, checked and split, the task understood, the model loaded.

Nothing here takes long, and whatever is wrong with data or model is found here, before any training.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..auto.plan import Plan
from ..core.errors import DataError
from ..core.prompt_method import PromptMethod
from ..core.quantised_linear import parameter_count
from ..data.made_rows import MadeRows
from ..data.read import reading
from ..data.table import Problem, Table
from ..tasks.base import Asked, Examples, Task, TaskModel
from ..tasks.loading import hold_as_asked
from ..tasks.models import locate
from ..tasks.registry import task_said
from .encode import Encoder
from .schema import DataPart, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

_TEST_SHARE, _MOST_TEST = 0.2, 2000
_VALID_SHARE, _MOST_VALID = 0.1, 500
_SHOWN = 20  # bad rows in one message


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
    asked: Asked
    model: TaskModel
    task: Task
    data: Data
    train: Examples
    valid: Examples
    test: Examples
    shift: dict[str, Examples]
    total_parameters: int  # of body and head
    encoder: Encoder

    def cut(self, max_length: int) -> None:
        """Encode all rows anew with a smaller maximal length."""
        self.task.max_length = max_length
        encode = partial(self.encoder, self.task)
        self.train, self.valid, self.test = map(encode, (self.data.train, self.data.valid, self.data.test))
        self.shift = {name: encode(table) for name, table in self.data.shift.items()}


def prepare(recipe: Recipe, plan: Plan, device: torch.device, seed: int) -> Work:
    """Read, check, split, load.  Raises DataError, ModelError or RecipeError naming all that is wrong."""
    kind, settings, method = task_said(recipe.task.name), recipe.task.build(), recipe.method_object()
    located = locate(recipe.model.path)  # first: a wrong name is found in milliseconds
    asked = Asked(
        model=replace(located, quantize=recipe.model.quantize),
        plan=plan,
        device=device,
        seed=seed,
        columns=recipe.data.columns,
        metric=recipe.report.metric,
        dtype=recipe.model.dtype,
        revision=recipe.model.revision,
        reserved=method.length if isinstance(method, PromptMethod) else 0,  # virtual tokens take positions too
    )
    with reading(recipe.data.in_memory):
        given, problems = _read(recipe.data, kind, settings)
    _say_what_is_lazy(given, recipe.data.in_memory, plan)
    rows = len(problems) + sum(map(len, given.values()))
    try:
        task = kind.understand(given, settings, asked)
    except DataError as error:
        if not problems or recipe.data.on_bad_row != "fail":
            raise
        found = bad_rows_message(problems, rows)
        raise DataError(f"{error}\nPerhaps because {found}") from error
    plan.decide("metric", asked.metric, task.metric, "usual for this kind; picks the best step, and is compared")
    notes: list[str] = []
    checked: dict[str, Table] = {}
    for name, table in given.items():
        bad = task.check(table)
        problems += [Problem(table.where(i), what) for i, what in sorted(bad.items())]
        checked[name] = table.select([i for i in range(len(table)) if i not in bad]) if bad else table
    if problems:
        if recipe.data.on_bad_row == "fail":
            raise DataError(bad_rows_message(problems, rows))
        notes.append(
            f"{len(problems)} bad rows were left out: "
            + "; ".join(map(str, problems[:3]))
            + (" ..." if len(problems) > 3 else "")
        )
    data = _divide(checked, task, plan, seed, notes)
    model = task.build(asked).train()
    if (held := hold_as_asked(model.body, asked.model)) is not None:
        plan.decide("base weights", None, held.format, str(held))
        notes += [f"The base is quantised: {held}", *asked.model.notes]
    if not recipe.train.shard:  # then only its part comes to the device
        model.to(device)
    task.settle(model, data.train, asked)
    encoder = Encoder(recipe.data.cache)
    encode = partial(encoder, task)
    work = Work(
        recipe=recipe,
        asked=asked,
        model=model,
        task=task,
        data=data,
        train=encode(data.train),
        valid=encode(data.valid),
        test=encode(data.test),
        shift={name: encode(table) for name, table in data.shift.items()},
        total_parameters=parameter_count(model),
        encoder=encoder,
    )
    _refuse_empty(work)
    if words := encoder.in_words():
        plan.decide("cache", None, *words)
    data.notes[:0] = task.notes  # whenever in all this it found something to say
    return work


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


def _read(data: DataPart, kind: type[Task], settings: Any) -> tuple[dict[str, Table], list[Problem]]:
    """All tables by name: train, valid, test, and "shift:NAME"."""
    tables, problems = kind.read(data.train, settings)
    if "train" not in tables:
        raise DataError(f"{data.train} has no training rows; it has {', '.join(tables)}")
    named = {"valid": data.valid, "test": data.test} | {f"shift:{name}": where for name, where in data.shift.items()}
    for name, where in named.items():
        if where is not None:
            tables[name], bad = read_one(kind, where, settings)
            problems += bad
    return tables, problems


def read_one(kind: type[Task], where: str, settings: Any) -> tuple[Table, list[Problem]]:
    """The rows at a place that has one part only.  Raises DataError as the task's `read`."""
    tables, problems = kind.read(where, settings)
    if len(tables) > 1:
        raise DataError(f"{where} has several splits: {', '.join(tables)}. Name the file of one of them.")
    return next(iter(tables.values())), problems


def _say_what_is_lazy(tables: Mapping[str, Table], said: bool | None, plan: Plan) -> None:
    """Enter in the plan which rows stay in their files, if any do."""
    lazy = [f"{name} ({len(table):,} rows)" for name, table in tables.items() if table.is_lazy]
    if lazy:
        why = "would take more than a quarter of the free memory" if said is None else "data.in_memory says so"
        plan.decide("read when needed", None, ", ".join(lazy), why)


def _divide(tables: dict[str, Table], task: Task, plan: Plan, seed: int, notes: list[str]) -> Data:
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
        plan.decide("test rows", None, len(test), f"held out of your data {task.split_words}")
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
    notes += task.remarks(train, test)
    shift = {name.removeprefix("shift:"): table for name, table in tables.items() if name.startswith("shift:")}
    return Data(train, valid, test, shift, notes)


def _refuse_empty(work: Work) -> None:
    """Raise DataError for rows that are cut before anything in them is judged."""
    if work.task.max_length is None:
        return
    shift = {f"shift:{name}": (table, work.shift[name]) for name, table in work.data.shift.items()}
    given = {"valid": (work.data.valid, work.valid), "test": (work.data.test, work.test), **shift}
    if empty := [f"{name} ({len(table):,} rows)" for name, (table, rows) in given.items() if table and not rows]:
        raise DataError(
            f"nothing is to be judged within {work.task.max_length} tokens in {', '.join(empty)}: raise task.max_length"
        )


def _hold_out(table: Table, task: Task, fraction: float, seed: int) -> tuple[Table, Table]:
    kept, held = task.hold_out(table, fraction, seed)
    return table.select(kept), table.select(held)


def digest_rows(digest: "hashlib._Hash", examples: Examples) -> None:
    """Let the digest depend on everything in these rows."""
    if isinstance(examples.inputs, MadeRows):
        digest.update(examples.inputs.sha256().encode())
    for row in () if isinstance(examples.inputs, MadeRows) else examples.inputs:
        for value in row.values():
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    for tensor in (examples.targets, examples.weights):
        digest.update(b"" if tensor is None else tensor.numpy().tobytes())


def bad_rows_message(problems: list[Problem], rows: int) -> str:
    """All bad rows in one message, the first of them named.   rows: good and bad."""
    shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    advice = "Mend them, or leave them out with --on-bad-row skip"
    return f"{len(problems)} of {rows:,} rows cannot be used:\n{shown}{more}\n{advice}"
