"""Run the demo and keep the end of what it prints as docs/demo.svg, the picture in the README."""

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from smidgen.recipes.demo import demo

WIDTH = 84


def main() -> None:
    """Print everything, and save from the table on."""
    said = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=False)
    demo(said, Path("out/demo"), seed=0)
    lines = said.export_text().splitlines()
    sys.stdout.write("\n".join(lines) + "\n")
    first = next(i for i, line in enumerate(lines) if "majority" in line and "tuned" in line)
    picture = Console(file=io.StringIO(), width=WIDTH, record=True)
    picture.print(Text("$ make demo\n"))
    picture.print(Text("\n".join(lines[first:])))
    picture.save_svg("docs/demo.svg", title="smidgen")


if __name__ == "__main__":
    main()
