"""What a model, an adapter folder or a checkpoint is made of, and which methods there are.  Reads no model weights."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import nn

from ..core.errors import CheckpointError, FolderError, SmidgenError
from ..core.layers import kind_of
from ..core.method import Method, methods
from ..core.safe import is_intact, read_header, read_json, read_tensors
from ..core.targets import body_layers
from ..evaluate.units import bytes_text, number_text, seconds_text, share_text
from ..formats.note import NOTE, Note, Several, read_note
from ..formats.write import CONFIG, WEIGHTS
from ..tasks.models import empty_body, locate
from ..training import checkpoint
from .catalogue import catalogue, layers_text, merges_text

_STEP = "step-*"
_NUMBERS = ("count", "parameters", "share", "trains", "step", "best step", "best value")
_WIDEST = 1000  # characters of a table


def inspect(what: str, console: Console) -> None:
    """Show a model (folder, package:NAME or hub name), an adapter folder, a checkpoint, or a folder of checkpoints.

    Raises ModelError, FolderError or CheckpointError; what is damaged is shown as far as it can be first.
    """
    path = Path(what).expanduser()
    if (path / CONFIG).exists() or (path / NOTE).exists():
        inspect_adapter(path, console)
    elif path.match(_STEP) or any(path.glob(_STEP)):
        inspect_checkpoint(path, console)
    else:
        inspect_model(what, console)


def inspect_model(name: str, console: Console) -> None:
    """Modules grouped with layer numbers starred, their parameters, and which of them the targets "auto" are."""
    model = empty_body(locate(name))
    auto, _ = body_layers(model)
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for path, module in model.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            role = "auto" if path in auto else ""
            groups.setdefault((_starred(path), type(module).__name__, _shape(module), role), []).append(own)
    total = sum(parameter.numel() for parameter in model.parameters())
    _say(console, {"model": name, "class": type(model).__name__, "parameters": f"{total:,}"})
    table = _table("count", "module", "type", "shape", "parameters", "share", "targets")
    for (path, kind, shape, role), sizes in groups.items():
        size = sum(sizes)
        table.add_row(str(len(sizes)), path, kind, shape, f"{size:,}", share_text(size / total), role)
    _print(console, table)
    blocks = Counter((_starred(path), type(module).__name__) for path, module in model.named_modules() if path)
    repeated = [f"{n} x {path} ({kind})" for (path, kind), n in blocks.items() if n > 1 and path.endswith(".*")]
    _say(console, {"blocks": ", ".join(repeated) or "none repeat"})
    _say(
        console,
        {"targets": '"auto" takes the rows marked so; others are said by path, such as "*.query" or "*.{0-5}.*"'},
    )


def inspect_adapter(folder: Path, console: Console) -> None:
    """Method, settings, places, sizes, task and base of an adapter folder, and whether it is as it was written."""
    note = read_note(folder)
    if isinstance(note, Several):
        _say(console, {"folder": str(folder), "adapters": ", ".join(note.adapters), "active": note.composition})
        for name in note.adapters:
            console.print()
            inspect_adapter(folder / name, console)
        return
    config, header = read_json(folder / CONFIG), read_header(folder / WEIGHTS)
    size = sum(math.prod(entry.shape) for entry in header.tensors.values())
    sizes = f"{size:,} parameters in {len(header.tensors)} tensors, {bytes_text(header.size_bytes)}"
    if note is None:
        _say(console, {"folder": str(folder), "method": config.get("peft_type"), "settings": _settings(config)})
        places = Counter(
            _starred(key.removeprefix("base_model.model.").rpartition(".lora_")[0] or key) for key in header.tensors
        )
        _say(console, {"places": _listed(places), "size": sizes, "base": config.get("base_model_name_or_path")})
        _say(console, {"checksums": "none: not written by smidgen"})
        return
    base = note.base.get("name"), note.base.get("class")
    places = Counter(f"{_starred('.'.join(filter(None, (p.path, p.parameter))))} ({p.kind})" for p in note.sites)
    _say(
        console,
        {"folder": str(folder), "adapter": note.name, "method": note.method, "settings": _settings(note.settings)},
    )
    _say(console, {"places": _listed(places), "heads": ", ".join(note.heads), "size": sizes})
    _say(console, {key: _settings(value) if isinstance(value, dict) else value for key, value in note.extra.items()})
    _say(console, {"base": " ".join(f"{part}" for part in base if part), "fingerprint": note.base.get("fingerprint")})
    _say(console, {"HF PEFT": f"cannot read it: {note.not_peft}" if note.not_peft else "reads it"})
    damaged = _damaged(folder, note)
    whole = len(note.tensors) - len(damaged)
    _say(console, {"checksums": f"{whole} of {len(note.tensors)} tensors are as they were written"})
    if damaged:
        raise FolderError(f"{folder / WEIGHTS} is damaged: {', '.join(damaged[:5])}. Use another copy of the folder")


def inspect_checkpoint(path: Path, console: Console) -> None:
    """Step and figures of a checkpoint, or of each in a folder of them, and whether it is whole."""
    folders = [path] if path.match(_STEP) else sorted(path.glob(_STEP))
    damaged = []
    table = _table("checkpoint", "step", "best step", "best value", "trained for", "size", "state")
    for folder in folders:
        size = bytes_text(sum(file.stat().st_size for file in folder.glob("*")))
        try:
            state = checkpoint.load(folder)
        except CheckpointError as error:
            damaged.append(str(error))
            table.add_row(folder.name, "", "", "", "", size, "damaged")
            continue
        best, seconds = state.history.get("best_value"), state.history.get("seconds")
        table.add_row(
            folder.name,
            str(state.step),
            str(state.history.get("best_step") or ""),
            "" if best is None else number_text(best),
            "" if seconds is None else seconds_text(seconds),
            size,
            "whole",
        )
    _print(console, table)
    if damaged:
        raise CheckpointError("\n".join(damaged))


def list_methods(console: Console, model: str | None = None) -> None:
    """All methods: formula, layers, whether they merge, HF PEFT's name; with a model, what each would train there."""
    body = empty_body(locate(model)) if model else None
    trains = ["trains", "share"] if body else []
    table = _table("method", "formula", "paper", "on", "merges", "in HF PEFT", *trains)
    failed = {}
    for each in catalogue():
        row = [each.name, each.formula, each.paper, layers_text(each), merges_text(each), each.hf or "-"]
        if body is not None:
            total = sum(parameter.numel() for parameter in body.parameters())
            try:
                size = _trained(methods()[each.name]().fitted(body), body)
                row += [f"{size:,}", share_text(size / total)]
            except SmidgenError as error:
                failed[each.name] = str(error).partition("\n")[0]
                row += ["-", "-"]
            except NotImplementedError:  # of torch: there are no numbers to compute with
                failed[each.name] = "how many depends on the weights, which are not loaded here"
                row += ["-", "-"]
        table.add_row(*map(Text, row))  # a formula's brackets are no markup
    _print(console, table)
    _say(console, {name: f"not on {model} with its own defaults: {reason}" for name, reason in failed.items()})


def _trained(method: Method, model: nn.Module) -> int:
    """How many parameters the method would train on the model.  Raises SmidgenError where it cannot act."""
    sites = method.resolve(model).sites
    modules: list[nn.Module] = [method.build(site) for site in sites]
    if (shared := method.shared(sites)) is not None:
        modules.append(shared)
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _damaged(folder: Path, note: Note) -> list[str]:
    """Which tensors are not as they were written; one that is not named there is not either."""
    tensors = read_tensors(folder / WEIGHTS)
    wrong = [name for name, said in note.tensors.items() if name not in tensors or not is_intact(tensors[name], said)]
    return wrong + [name for name in tensors if name not in note.tensors]


def _starred(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _shape(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None:
        return ""
    fan_out, fan_in = kind.fans(module)
    return f"{fan_in:,} -> {fan_out:,}" if kind.low_rank else f"{fan_out:,}"


def _settings(values: Mapping[str, Any]) -> str:
    said = {key: value for key, value in values.items() if value is not None and value != [] and value != {}}
    return ", ".join(f"{key} {_short(value)}" for key, value in said.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= 12 else f"({len(value)} items)"
    return f"({len(value)} entries)" if isinstance(value, dict) else str(value)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMBERS else "left")
    return table


def _print(console: Console, table: Table) -> None:
    """Whole, also where the terminal is narrow or there is none: a path that is cut helps nobody."""
    console.print()
    table.width = Measurement.get(console, console.options.update_width(_WIDEST), table).maximum
    console.print(table, crop=False)
    console.print()


def _say(console: Console, facts: Mapping[str, Any]) -> None:
    """One line for each fact; what is not known is left out.  Texts of a stranger are printed as they are."""
    for name, value in facts.items():
        if value not in (None, ""):
            console.print(f"{name:12s} {value}", markup=False, highlight=False, soft_wrap=True)
