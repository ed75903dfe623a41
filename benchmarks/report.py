"""Make docs/benchmarks.md from benchmarks/results/*.json. Every benchmark calls this when it has saved its results."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    parts = [INTRODUCTION, claims_table([claim for result in results for claim in result["claims"]])]
    parts += [section(result) for result in results]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts))


def claims_table(claims: list[dict[str, Any]]) -> str:
    """The figures this project holds itself to, met or not."""
    rows = [
        [each["claim"], f"at most {number(each['limit'])}", number(each["is"]), "yes" if met(each) else "**no**"]
        for each in claims
    ]
    return "## Figures to hold\n\n" + table(["", "limit", "measured", "met"], rows)


def met(claim: dict[str, Any]) -> bool:
    return bool(claim["is"] <= claim["limit"])


def section(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    where = (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, Python {machine['python']}, threads: {machine['threads']}; "
        + ", ".join(f"{package} {release}" for package, release in versions.items())
    )
    parts = [f"## {result['title']}\n\n{result['text']}\n\n*{where}*\n"]
    parts += [f"### {each['title']}\n\n{table_of(each)}" for each in result["tables"]]
    return "\n".join(parts)


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
    main()
