"""Kill a run at random moments and resume it: does it always continue by itself, and to the same bits?

    python benchmarks/kill_resume.py [--kills 20] [--seed 0]

A tiny model is tuned with the real command line, saving every step.  It is killed (SIGKILL), resumed with --resume,
killed again, and so on; a run that ends before it is killed is followed by another.  Three of four kills come while it
trains, judges and writes its result, the others at any time.  Printed are how many kills were followed by a resume that
needed no hand, and how many runs came to the bits of an unbroken one.
"""

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import reviews, tiny_bert, write_csv  # noqa: E402

from smidgen.core.files import sha256_file  # noqa: E402

STEPS = 100
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(folder: Path, out: Path) -> list[str]:
    """A run of `smidgen tune` that saves every step."""
    said = {"steps": STEPS, "batch": 8, "learning_rate": 0.01, "precision": "fp32"}
    said |= {"evaluate_every": 20, "save_every": 1, "patience": 100}
    settings = [part for key, value in said.items() for part in ("--set", f"train.{key}={value}")]
    dropout = ["--set", "method.dropout=0.1"]
    paths = ["--model", str(folder / "bert"), "--data", str(folder / "reviews.csv"), "--out", str(out)]
    return [sys.executable, "-m", "smidgen", "tune", *paths, *settings, *dropout]


@dataclass(frozen=True)
class Run:
    """How a command ended, what it said, and its seconds in all and since the first step that it saved."""

    ending: Literal["finished", "killed", "failed"]
    said: str
    seconds: float
    seconds_of_training: float


def run(words: list[str], checkpoints: Path, kill_after_s: float = math.inf, *, training: bool = False) -> Run:
    """Run a command, and kill it after some seconds: of all, or of those since it saved its first step."""
    before, started, first = newest_step(checkpoints), time.monotonic(), None
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(words, env=ENVIRONMENT, stdout=said, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                now = time.monotonic()
                if first is None and newest_step(checkpoints) > before:
                    first = now
                since = first if training else started
                if since is not None and now - since > kill_after_s:
                    process.kill()
                    process.wait()
                time.sleep(0.002)
        said.seek(0)
        text = said.read().decode()
    ended = time.monotonic()
    endings: dict[int, Literal["finished", "killed"]] = {0: "finished", -signal.SIGKILL: "killed"}
    return Run(endings.get(process.returncode, "failed"), text, ended - started, ended - (first or ended))


def result(out: Path) -> list[str]:
    """What a run came to, as checksums."""
    return [sha256_file(out / name) for name in ("adapter_model.safetensors", "head.safetensors")]


def main() -> None:
    """Print k/N for the kills, and for the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    said = parser.parse_args()
    moments = random.Random(said.seed)
    runs = equal = failed = 0
    steps: list[int] = []  # how far the run was at each kill
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_bert(folder / "bert")
        write_csv(folder / "reviews.csv", reviews(120))
        unbroken = run(command(folder, folder / "unbroken"), folder / "unbroken.checkpoints")
        if unbroken.ending != "finished":
            sys.exit(unbroken.said)
        while len(steps) < said.kills:
            out, checkpoints = folder / f"killed-{runs}", folder / f"killed-{runs}.checkpoints"
            words, ended = command(folder, out), None
            while ended is None or ended.ending == "killed":
                training = moments.random() < 0.75
                within = unbroken.seconds_of_training if training else unbroken.seconds
                moment = moments.uniform(0, within) if len(steps) < said.kills else math.inf
                ended = run(words, checkpoints, moment, training=training)
                if ended.ending == "killed":
                    steps.append(STEPS if out.exists() else newest_step(checkpoints))
                    words = [*command(folder, out), "--resume"]
            runs += 1
            failed += ended.ending == "failed"
            left = [path.name for path in folder.iterdir() if path.name.startswith((".smidgen-", f"{out.name}."))]
            same = ended.ending == "finished" and result(out) == result(folder / "unbroken")
            equal += same and not left
            if left or not same:
                print(f"{ended.said}\n{out.name}: the same bits: {same}; left behind: {left}", file=sys.stderr)
    print(
        f"{said.kills - failed}/{said.kills} kills needed no hand; they came at steps {steps} of {STEPS} (-1: before)"
    )
    print(f"{equal}/{runs} runs came to the bits of an unbroken one")
    sys.exit(failed > 0 or equal < runs)


def newest_step(checkpoints: Path) -> int:
    """The newest step that is saved; -1 where there is none."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=-1)


if __name__ == "__main__":
    main()
