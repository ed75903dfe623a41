"""What tuning comes to in every example: base, tuned and full fine-tuning on the same test rows, by seed.

Each run is `smidgen tune examples/NAME/recipe.yaml` in a process of its own, with full fine-tuning beside it; where a
folder has more recipes, NAME/RECIPE is another of them.  The figures are those of its report.json: the metric with its
interval, and in the last table what else the task measures and what the models come to on other data, seed by seed.
Other runs may have gone on beside one: compare its seconds with full's, of the same run, and not with another's.
Where "tuned over full" is empty, the run is older than that column.
Examples whose packages and data are not there are passed over: make example NAME=... brings them.

    python benchmarks/examples.py [NAME ...] [--seeds 0 1 2] [--minutes 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import RESULTS, save

from smidgen.evaluate.verdict import BEHIND

EXAMPLES = Path(__file__).parent.parent / "examples"
COLUMNS = ["example", "seed", "task", "metric", "without", "base", "base is", "tuned", "tuned over base", "full"]
COLUMNS += ["tuned over full", "method", "trained", "share", "seconds", "full's seconds", "bytes"]
WHY = ["example", "seed", "why"]
FURTHER = ["example", "figure", "seeds", "base", "tuned", "full"]


@dataclass(frozen=True)
class Found:
    """What an example with one seed came to.

    why: what the report says of why full fine-tuning is better.   further: figure -> of base, tuned and full.
    """

    line: list[Any]
    why: list[str]
    further: dict[str, list[float | None]]


def run(name: str, seed: int, minutes: float | None) -> Found:
    """An example with one seed."""
    with tempfile.TemporaryDirectory() as folder:
        out, (example, _, recipe) = Path(folder) / "out", name.partition("/")
        path = EXAMPLES / example / f"{recipe or 'recipe'}.yaml"
        words = [sys.executable, "-m", "smidgen", "tune", str(path), "--seed", str(seed)]
        words += ["--against", "full", "--out", str(out), "--fresh"]
        if minutes is not None:
            words += ["--minutes", str(minutes)]
        subprocess.run(words, check=True)
        report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    base, tuned, full = rows["base"], rows["tuned"], rows["full"]
    without = next((row["value"] for key, row in rows.items() if key not in ("base", "tuned", "full")), "")
    why = [note for note in report["notes"] if note.startswith(BEHIND)]
    line = [
        name,
        seed,
        report["task"],
        report["metric"] + ("" if report["higher_is_better"] else " (lower is better)"),
        without,
        base["value"],
        report["base_name"],
        f"{tuned['value']:.3f} ({tuned['low']:.3f} to {tuned['high']:.3f})",
        difference(report["difference"]),
        full["value"],
        difference(report["over_full"]),
        report["method"],
        tuned["trainable"],
        f"{tuned['share']:.2%}",
        tuned["seconds"],
        full["seconds"],
        tuned["disk_bytes"],
    ]
    three = (base, tuned, full)
    further = {figure: [row["others"].get(figure) for row in three] for figure in tuned["others"]}
    for shift in report["shift"]:
        estimates = [shift[key] for key in ("base", "tuned", "full")]
        further[f"{report['metric']} on {shift['name']}"] = [each and each["value"] for each in estimates]
    return Found(line, [note.removeprefix(BEHIND) for note in why], further)


def with_seed(row: list[Any] | None, name: str, figure: str, seed: int, values: list[float | None]) -> list[Any]:
    """A line of the last table, the figures of one seed put in among those of others."""
    columns = [cell.split(", ") for cell in row[2:]] if row else [[] for _ in FURTHER[2:]]
    lines = [line for line in zip(*columns, strict=True) if line[0] != str(seed)]
    lines.append((str(seed), *("–" if value is None else f"{value:.3f}" for value in values)))
    lines.sort(key=lambda line: int(line[0]))
    return [name, figure, *(", ".join(cells) for cells in zip(*lines, strict=True))]


def is_prepared(name: str) -> bool:
    """Whether `make example` has brought the packages and the data of an example."""
    folder = EXAMPLES / name.partition("/")[0]
    required = [
        line.partition("==")[0] for line in (folder / "requirements.txt").read_text().splitlines() if "==" in line
    ]
    data = f".cache/{folder.name}"
    wanted = data in (folder / "prepare.py").read_text()
    return all(map(_is_installed, required)) and (Path(data).exists() or not wanted)


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def difference(estimate: dict[str, float]) -> str:
    """A paired difference with its interval."""
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def main() -> None:
    paths = EXAMPLES.glob("*/*.yaml")
    names = sorted(p.parent.name if p.stem == "recipe" else f"{p.parent.name}/{p.stem}" for p in paths)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, help="for each run; the recipe's own where nobody says")
    said = parser.parse_args()
    stored = RESULTS / "examples.json"
    for name in said.names:
        if not is_prepared(name):
            print(f"{name} is passed over: make example NAME={name.partition('/')[0]} brings what it needs")
            continue
        for seed in said.seeds:
            found = run(name, seed, said.minutes)
            tables = json.loads(stored.read_text())["tables"] if stored.exists() else []  # read now: others may write
            lines, why, further = (table["rows"] for table in tables or [{"rows": []}] * 3)
            lines = [*(row for row in lines if row[:2] != [name, seed]), found.line]
            why = [*(row for row in why if row[:2] != [name, seed]), *([name, seed, each] for each in found.why)]
            known = {(row[0], row[1]): row for row in further}
            for figure, values in found.further.items():
                known[name, figure] = with_seed(known.get((name, figure)), name, figure, seed, values)
            titled = [("Examples", COLUMNS, lines), ("Where tuned is behind full fine-tuning, and why", WHY, why)]
            titled.append(("Further figures, seed by seed", FURTHER, list(known.values())))
            tables = [{"title": t, "columns": c, "rows": sorted(rows, key=lambda r: r[:2])} for t, c, rows in titled]
            save("examples", "What tuning comes to in the examples", (__doc__ or "").split("\n\n")[1], tables, [])


if __name__ == "__main__":
    main()
