"""Write docs/methods.md, the README's table of methods, and docs/recipes.md's of tasks and presets.

    python tools/methods_page.py [--check]

What a method is comes from the method itself (smidgen.recipes.catalogue), what was measured from benchmarks/results.
--check writes nothing, and fails where a page is not what would be written.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smidgen.auto.presets import PRESETS, preset
from smidgen.core.method import methods
from smidgen.recipes.catalogue import Facts, catalogue, layers_text, merges_text
from smidgen.tasks.registry import tasks

ROOT = Path(__file__).parent.parent
README, PAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "benchmarks" / "results"
RECIPES = ROOT / "docs" / "recipes.md"
_FOLDERS = {"arrow": "those of its experts", "qalora": "read", "xlora": "read"}  # HF PEFT's, where not both ways
INTRODUCTION = """# Methods

*Made by `tools/methods_page.py` from the methods themselves and `benchmarks/results/`. Change those, not this page.*

Each method is one file in `src/smidgen/methods/`, which opens with its formula, its letters and its paper. `smidgen
methods --model MODEL` says how many parameters each would train on your model; `smidgen tune --method NAME` takes its
[preset](recipes.md#presets). `smidgen convert` rewrites a folder as a plain LoRA where the method changes weights.

"on" is where it acts. linear: Linear and GPT-2's transposed Conv1D; conv: 1-d to 3-d, strided, dilated, grouped and
depthwise; norm: LayerNorm, RMSNorm, BatchNorm, GroupNorm; recurrent: weights of LSTM, GRU, RNN; experts: stacks of
matrices in one parameter. "merges": it can become part of the weights, and then costs nothing. "HF PEFT": its type of
that name, whose [folders](folder.md#hugging-face-peft-both-ways) are read and written. "lines": of its file.
"""


def main() -> None:
    facts = catalogue()
    pages = {
        README: _with(README.read_text(), "methods", _readme_table(facts)),
        RECIPES: _with(_with(RECIPES.read_text(), "tasks", _tasks_table()), "presets", _presets_table()),
        PAGE: _page(facts),
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        if stale:
            sys.exit(f"{', '.join(path.name for path in stale)}: not as tools/methods_page.py would write it; run that")
        return
    for path in stale:
        path.write_text(pages[path])
        print(f"written: {path.relative_to(ROOT)}")


def _with(page: str, name: str, table: str) -> str:
    """The page with this table between its two marks."""
    begin, end = f"<!-- {name}: made by tools/methods_page.py -->", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def _tasks_table() -> str:
    rows = []
    for name, task in tasks().items():
        hints = get_type_hints(task.Settings)
        keys = [f"`{field.name}`{_choices(hints[field.name])}{_default(field)}" for field in fields(task.Settings)]
        rows.append(
            [f"`{name}`", task.summary, ", ".join(keys) or "none", ", ".join(f"`{role}`" for role in task.roles)]
        )
    return _table(["task", "what", "keys under `task:`", "roles under `data.columns:`"], rows)


def _choices(hint: Any) -> str:
    """The words that a key may be, if it is one of a few."""
    words = [word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part)]
    return f" ({', '.join(words)})" if words else ""


def _default(field: Any) -> str:
    return "" if field.default is None else f" = {json.dumps(field.default)}"


def _presets_table() -> str:
    rows = []
    for name in [*sorted(PRESETS), "any other"]:
        each = preset(name)
        numbers = (each.learning_rate, each.head_learning_rate, each.weight_decay, each.epochs)
        settings = ", ".join(f"{key} {_setting(value)}" for key, value in each.settings.items())
        rows.append(
            [f"`{name}`" if name in PRESETS else name, *(f"{number:g}" for number in numbers), settings, each.why]
        )
    return _table(
        ["method", "learning rate", "of the head", "weight decay", "epochs, at most", "settings", "why"], rows
    )


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _readme_table(facts: Sequence[Facts]) -> str:
    rows = [
        [
            f"`{each.name}`",
            _formula(each),
            merges_text(each),
            _FOLDERS.get(each.name, "both ways") if each.hf else "it has none",
            _linked(each.paper),
        ]
        for each in facts
    ]
    table = _table(["method", "formula", "merges", "HF PEFT's folders", "paper"], rows)
    return f"<details><summary>All {len(facts)} methods</summary>\n\n{table}\n\n</details>"


def _page(facts: Sequence[Facts]) -> str:
    rows = [
        [
            f"`{each.name}`",
            _formula(each),
            layers_text(each),
            merges_text(each),
            f"`{each.hf}`" if each.hf else "–",
            _linked(each.paper),
            str(_lines(each.name)),
        ]
        for each in facts
    ]
    columns = ["method", "formula", "on", "merges", "HF PEFT", "paper", "lines"]
    parts = [INTRODUCTION, _table(columns, rows)]
    parts += [text for name in ("methods", "presets") if (text := _results(name))]
    return "\n".join(parts) + "\n"


def _results(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return ""
    result: dict[str, Any] = json.loads(path.read_text())
    tables = "\n\n".join(
        f"*{each['title']}*\n\n" + _table(each["columns"], [[_figure(cell) for cell in row] for row in each["rows"]])
        for each in result["tables"]
    )
    machine = result["machine"]
    where = f"*{machine['processor']}, {machine['cores']} cores, one thread; peft {result['versions']['peft']}*"
    return f"\n## {result['title']}\n\n{result['text']}\n\n{where}\n\n{tables}"


def _figure(cell: Any) -> str:
    if isinstance(cell, dict):
        cell = cell["median"]
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _formula(each: Facts) -> str:
    return f"`{each.formula}`"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", paper)


def _lines(name: str) -> int:
    return len(Path(sys.modules[methods()[name].__module__].__file__ or "").read_text().splitlines())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
