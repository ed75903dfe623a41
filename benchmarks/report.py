"""Make docs/benchmarks.md and its plots from benchmarks/results/*.json. Every benchmark does so when it has saved.

python benchmarks/report.py [--check]      only see whether the page is that of the results
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLOTS, PAGE = ROOT / "docs" / "plots", ROOT / "docs" / "benchmarks.md"
PLOTTED = {  # result -> columns of its tables that are drawn as bars
    "end_to_end": ("over HF as it comes",),
    "kernels": ("forward and backward / floor",),
    "linear_cross_entropy": ("of HF's",),
    "memory": ("kept for backward, MB", "peak above the model, MB", "time / recompute: off"),
    "quantised": ("time / dense", "weights, MB"),
    "training_step": ("time / floor", "kept for backward / floor"),
}
OURS, OTHERS = "#2563eb", "#94a3b8"
INTRODUCTION = """# Benchmarks

*Made by `benchmarks/report.py` from `benchmarks/results/*.json`. Change the benchmarks, not this page.*

Every claim about speed or memory is a command that runs ours and the other tool side by side: in one process, on one
thread, in rounds that run everything once in random order. Times are process CPU time. A figure over a floor is formed
inside each round; "times ours" is formed of the two medians. What stands here is the median, with the quartiles in
brackets where there were several rounds. The machines are shared and small: compare ratios, not seconds.

```console
make bench                                                # all, in full
.venv/bin/python benchmarks/training_step.py --help       # one
.venv/bin/python benchmarks/report.py                     # this page again
```
"""


def main() -> None:
    results = read()
    for name, result in results.items():
        for number, each in enumerate(result["tables"]):
            if columns := drawn_columns(name, each):
                draw(each, columns, PLOTS / plot_of(name, number))
    PAGE.write_text(page(results))


def check() -> None:
    """Exit with 1 where the page is not that of the results."""
    if PAGE.read_text() != page(read()):
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what benchmarks/results says: run benchmarks/report.py")


def read() -> dict[str, Any]:
    """All results by name."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def page(results: dict[str, Any]) -> str:
    """All of docs/benchmarks.md."""
    parts = [INTRODUCTION, claims_table([claim for result in results.values() for claim in result["claims"]])]
    parts += [section(name, result) for name, result in results.items()]
    return "\n".join(parts)


def claims_table(claims: list[dict[str, Any]]) -> str:
    """The figures this project holds itself to, met or not."""
    rows = [
        [each["claim"], f"at most {number(each['limit'])}", number(each["is"]), "yes" if met(each) else "**no**"]
        for each in claims
    ]
    return "## Figures to hold\n\n" + table(["", "limit", "measured", "met"], rows)


def met(claim: dict[str, Any]) -> bool:
    return bool(claim["is"] <= claim["limit"])


def section(name: str, result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    where = (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}, threads: {machine['threads']}; "
        + ", ".join(f"{package} {release}" for package, release in versions.items())
    )
    if run := result.get("run"):
        where += f"; `{run['command']}`, {run['date']}"
    parts = [f"## {result['title']}\n\n{result['text']}\n\n*{where}*\n"]
    for number, each in enumerate(result["tables"]):
        parts.append(f"### {each['title']}\n\n{table_of(each)}")
        if drawn_columns(name, each):
            parts.append(f"![{each['title']}](plots/{plot_of(name, number)})\n")
    return "\n".join(parts)


def drawn_columns(name: str, each: dict[str, Any]) -> list[str]:
    return [column for column in PLOTTED.get(name, ()) if column in each["columns"]]


def plot_of(name: str, number: int) -> str:
    return f"{name}-{number}.svg"


def draw(each: dict[str, Any], columns: list[str], file: Path) -> None:
    """Bars of some columns of a table, ours in blue, with the quartiles where there were several rounds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = file.stem  # the same numbers give the same file
    from matplotlib import pyplot

    names = [str(row[0]).replace("**", "") for row in each["rows"]]
    size = (5.2 * len(columns) + 2, 0.34 * len(names) + 1.1)
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, column in zip(axes[0], columns, strict=True):
        cells = [row[each["columns"].index(column)] for row in each["rows"]]
        spreads = [cell if isinstance(cell, dict) else {"median": cell, "low": cell, "high": cell} for cell in cells]
        values, lows, highs = (
            [math.nan if spread[end] is None else spread[end] for spread in spreads]
            for end in ("median", "low", "high")
        )
        ends = [
            [v - low for v, low in zip(values, lows, strict=True)],
            [h - v for v, h in zip(values, highs, strict=True)],
        ]
        colours = [OURS if "smidgen" in name else OTHERS for name in names]
        axis.barh(names, values, color=colours, xerr=ends, error_kw={"elinewidth": 1, "ecolor": "#334155"})
        for place, value in enumerate(values):
            if not math.isnan(value):
                axis.annotate(number(value), (value, place), (6, 0), textcoords="offset points", va="center", size=8)
        if "MB" not in column:  # a ratio
            axis.axvline(1, color="#334155", linewidth=0.8, linestyle=":")
        axis.set_xlim(0, 1.15 * max([1.0, *(value for value in values if not math.isnan(value))]))
        axis.set_xlabel(column)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def table_of(each: dict[str, Any]) -> str:
    """One table of a result, in Markdown."""
    return table(
        each["columns"], [[cell if isinstance(cell, str) else figure(cell) for cell in row] for row in each["rows"]]
    )


def figure(value: Any) -> str:
    """A number, or a spread with its quartiles; a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        if value["rounds"] == 1:
            return number(value["median"])
        return f"{number(value['median'])} ({number(value['low'])} to {number(value['high'])})"
    return number(value)


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    digits = 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.001 else f"{value:.1g}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    line = "| " + " | ".join(columns) + " |\n|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|\n"
    return line + "".join("| " + " | ".join(row) + " |\n" for row in rows)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else main()
