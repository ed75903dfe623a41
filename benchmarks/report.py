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
OURS, OTHERS, EDGE = "#2563eb", ("#94a3b8", "#cbd5e1"), "#334155"
UNITS = (", MB", ", CPU s")  # at the end of a column that is no ratio
SPAN = 10  # largest over smallest of ratios from which their axis is logarithmic
INTRODUCTION = """# Benchmarks

*Made by `benchmarks/report.py` from `benchmarks/results/*.json`. Change the benchmarks, not this page.*

Every claim about speed or memory is a command that runs ours and the other tool side by side: in one process, on one
thread, in rounds that run everything once in random order. Times are CPU time of the process; columns that say wall
are wall time of the same runs. A figure over a floor is formed inside each round; "times ours" is formed of the two
medians. What stands here is the median, with the quartiles in brackets where there were several rounds. The machines
are shared and small: compare ratios, not seconds.

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
            if panels := each.get("plot"):
                draw(each, panels, PLOTS / plot_of(name, number))
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
        if each.get("plot"):
            parts.append(f"![{each['title']}](plots/{plot_of(name, number)})\n")
    return "\n".join(parts)


def plot_of(name: str, number: int) -> str:
    return f"{name}-{number}.svg"


def draw(each: dict[str, Any], panels: list[list[str]], file: Path) -> None:
    """Bars of a table, ours in blue, with the quartiles where there were several rounds.

    A row is drawn where all drawn columns have figures. In a panel of one column ours is a row with our name, in a
    panel of more a column.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = file.stem  # the same numbers give the same file
    from matplotlib import pyplot

    places = {column: each["columns"].index(column) for panel in panels for column in panel}
    rows = [row for row in each["rows"] if not any(isinstance(row[place], str | None) for place in places.values())]
    names, widest = [str(row[0]).replace("**", "") for row in rows], max(map(len, panels))
    size = (5.2 * len(panels) + 2, (0.14 + 0.2 * widest) * len(names) + 1.1)
    picture, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        draw_panel(axis, names, {column: [spread_of(row[places[column]]) for row in rows] for column in panel})
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    file.parent.mkdir(exist_ok=True)
    picture.savefig(file, metadata={"Date": None})
    pyplot.close(picture)


def draw_panel(axis: Any, names: list[str], figures: dict[str, list[dict[str, float]]]) -> None:
    """The bars of some columns on one axis; ratios that span much start at 1, on a logarithmic one."""
    medians = [each["median"] for spreads in figures.values() for each in spreads]
    known = [median for median in medians if not math.isnan(median)] or [1.0]
    is_ratio = not any(column.endswith(UNITS) for column in figures)
    start = 1 if is_ratio and max(known) > SPAN * min(known) else 0
    others, height = iter(OTHERS), 0.8 / len(figures)
    for position, (column, spreads) in enumerate(figures.items()):
        colours: Any = [OURS if "smidgen" in name else OTHERS[0] for name in names]
        if len(figures) > 1:
            colours = OURS if "smidgen" in column else next(others)
        ends = [[each["median"] - each["low"] for each in spreads], [each["high"] - each["median"] for each in spreads]]
        places = [row + height * (position - (len(figures) - 1) / 2) for row in range(len(names))]
        axis.barh(
            places,
            [each["median"] - start for each in spreads],
            height,
            left=start,
            color=colours,
            xerr=ends,
            error_kw={"elinewidth": 1, "ecolor": EDGE},
            label=column.replace("**", ""),
        )
        for place, each in zip(places, spreads, strict=True):
            if not math.isnan(each["median"]):
                text = {"textcoords": "offset points", "va": "center", "size": 8}
                axis.annotate(number(each["median"]), (max(each["high"], start), place), (4, 0), **text)
    if is_ratio:
        axis.axvline(1, color=EDGE, linewidth=0.8, linestyle=":")
    if start:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(0.9 * min(1, *known), 2 * max(known))
    else:
        axis.set_xlim(0, 1.15 * max(1, *known))
    if len(figures) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    else:
        axis.set_xlabel(next(iter(figures)).replace("**", ""))
    axis.spines[["top", "right"]].set_visible(False)


def spread_of(cell: Any) -> dict[str, float]:
    """A number as a spread of no width."""
    if isinstance(cell, dict):
        return {end: math.nan if cell[end] is None else cell[end] for end in ("median", "low", "high")}
    return {"median": cell, "low": cell, "high": cell}


def table_of(each: dict[str, Any]) -> str:
    """One table of a result, in Markdown."""
    return table(
        each["columns"], [[cell if isinstance(cell, str) else figure(cell) for cell in row] for row in each["rows"]]
    )


def figure(value: Any) -> str:
    """A number, or a spread with its quartiles; a dash for what was not measured."""
    if value is None or value != value:
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
