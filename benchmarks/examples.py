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

EXAMPLES = Path(__file__).parent.parent / "examples"
COLUMNS = ["example", "task", "seed", "metric", "without", "base", "tuned", "tuned over base", "full", "method"]
COLUMNS += ["trained", "share", "seconds", "full's seconds", "bytes"]


def run(name: str, seed: int, minutes: float | None) -> list[Any]:
    """One line: an example with one seed."""
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
    gain = report["difference"]
    return [
        name,
        report["task"],
        seed,
        report["metric"] + ("" if report["higher_is_better"] else " (lower is better)"),
        without,
        base["value"],
        f"{tuned['value']:.3f} ({tuned['low']:.3f} to {tuned['high']:.3f})",
        f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})",
        full["value"],
        report["method"],
        tuned["trainable"],
        f"{tuned['share']:.2%}",
        tuned["seconds"],
        full["seconds"],
        tuned["disk_bytes"],
    ]


def main() -> None:
    paths = EXAMPLES.glob("*/*.yaml")
    names = sorted(p.parent.name if p.stem == "recipe" else f"{p.parent.name}/{p.stem}" for p in paths)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, help="for each run; the recipe's own where nobody says")
    said = parser.parse_args()
    stored = RESULTS / "examples.json"
    old = json.loads(stored.read_text())["tables"][0]["rows"] if stored.exists() else []
    rows = {(row[0], row[2]): row for row in old}
    for name in said.names:
        for seed in said.seeds:
            rows[name, seed] = run(name, seed, said.minutes)
            tables = [{"title": "examples", "columns": COLUMNS, "rows": [rows[key] for key in sorted(rows)]}]
            save("examples", "What tuning comes to in the examples", (__doc__ or "").split("\n\n")[1], tables, [])


if __name__ == "__main__":
    main()
