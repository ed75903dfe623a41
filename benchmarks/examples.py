"""What tuning comes to in every example: base, tuned and full fine-tuning on the same test rows, by seed.

Each run is `smidgen tune examples/NAME/recipe.yaml` in a process of its own, with full fine-tuning beside it; where a
folder has more recipes, NAME/RECIPE is another of them.  The figures are those of its report.json.  The packages and
data must be there: make example NAME=... brings them.

    python benchmarks/examples.py [NAME ...] [--seeds 0 1 2] [--minutes 5]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, save

from smidgen.evaluate.verdict import BEHIND

SEED = 1  # where it stands in a row
EXAMPLES = Path(__file__).parent.parent / "examples"
COLUMNS = ["example", "seed", "task", "metric", "without", "base", "tuned", "tuned over base", "full"]
COLUMNS += ["tuned over full", "method", "trained", "share", "seconds", "full's seconds", "bytes"]
WHY = ["example", "seed", "why"]


def run(name: str, seed: int, minutes: float | None) -> tuple[list[Any], list[Any]]:
    """An example with one seed: its line, and one that says why full fine-tuning is better, where it certainly is."""
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
    return [line], [[name, seed, note.removeprefix(BEHIND)] for note in why]


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
        for seed in said.seeds:
            found = run(name, seed, said.minutes)
            tables = json.loads(stored.read_text())["tables"] if stored.exists() else [{"rows": []}, {"rows": []}]
            for table, new in zip(tables, found, strict=True):
                others = [row for row in table["rows"] if (row[0], row[SEED]) != (name, seed)]
                table["rows"] = sorted([*others, *new], key=lambda row: (row[0], row[SEED]))
            tables = [
                {"title": "examples", "columns": COLUMNS, "rows": tables[0]["rows"]},
                {"title": "Where full fine-tuning is certainly better", "columns": WHY, "rows": tables[1]["rows"]},
            ]
            save("examples", "What tuning comes to in the examples", (__doc__ or "").split("\n\n")[1], tables, [])


if __name__ == "__main__":
    main()
