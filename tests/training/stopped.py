"""What each of two ranks does in `test_distributed.py`: a run to its end; the same run, stopped after step 4 by a
signal to the second rank alone; and that one resumed.
"""

import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from rich.console import Console

from smidgen.recipes.load import load_recipe
from smidgen.recipes.run import tune
from smidgen.training.distributed import end_together
from smidgen.training.progress import Progress


class Stopping(Progress):
    def step(self, number: int, *args: Any) -> None:
        super().step(number, *args)
        if number == 4 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGINT)


def run(out: str, *, resume: bool = False) -> None:
    recipe = load_recipe("recipe.yaml", flags={"--out": out}, settings=[])
    tune(recipe, resume=resume, fresh=False, console=Console(width=200))


def main() -> None:
    run("unbroken")
    with patch.object(sys.modules[tune.__module__], "Progress", Stopping):
        try:
            run("stopped")
        except KeyboardInterrupt as stop:
            print(f"{dist.get_rank()}: {stop}")
    dist.barrier()  # the first process writes; what it wrote last is what all continue from
    assert not Path("stopped").exists()
    run("stopped", resume=True)
    end_together()


if __name__ == "__main__":
    main()
