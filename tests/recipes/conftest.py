"""Tiny models, data that can be learned, and a run in one call."""

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from smidgen.core.files import sha256_file
from smidgen.core.safe import read_tensors, write_tensors
from smidgen.recipes.run import tune
from smidgen.recipes.schema import Recipe
from smidgen.recipes.use import evaluate
from smidgen.training import loop

from ..tiny import reviews, tiny_bert, tiny_llama, write_csv


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """120 reviews as a CSV file."""
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", reviews(120))


@pytest.fixture
def with_other_weight(bert, tmp_path_factory) -> Path:
    """The same model with the weight of one linear layer a little larger."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(bert, folder)
    tensors = read_tensors(bert / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"] *= 1.1
    write_tensors(folder / "model.safetensors", tensors)
    return folder


def digest(out) -> list[str]:
    return [sha256_file(out / name) for name in ("adapter_model.safetensors", "head.safetensors")]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Run:
    """A finished run: where its result is, what it said, and its report."""

    def __init__(self, out: Path, said: str) -> None:
        self.out, self.said = out, said

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.report["rows"]}

    @property
    def plan(self) -> dict[str, str]:
        return {entry["setting"]: entry["value"] for entry in self.report["plan"]}


@pytest.fixture
def start(tmp_path, bert, data) -> Callable[..., Run]:
    """A function that runs a recipe, a short one unless told otherwise."""

    def start(*, resume: bool = False, fresh: bool = False, **parts: Any) -> Run:
        usual = {"steps": 6, "batch": 8, "learning_rate": 0.01, "evaluate_every": 3, "precision": "fp32"}
        train = usual | parts.pop("train", {})
        recipe = {"model": str(bert), "data": str(data), "out": str(tmp_path / "out"), "train": train} | parts
        said = io.StringIO()
        console = Console(file=said, width=200)
        return Run(tune(Recipe.model_validate(recipe), resume=resume, fresh=fresh, console=console), said.getvalue())

    return start


@pytest.fixture
def stopped(start, tmp_path, monkeypatch):
    """A function that starts a run and stops it after a step, as Ctrl-C does."""

    def stopped(after: int = 4, **parts):
        with monkeypatch.context() as patch:
            step = loop.Progress.step

            def stepped(self, number, *args):
                step(self, number, *args)
                if number == after:
                    signal.raise_signal(signal.SIGINT)

            patch.setattr(loop.Progress, "step", stepped)
            with pytest.raises(KeyboardInterrupt) as caught:
                start(**parts)
        assert str(caught.value) == f"stopped at step {after} of 6; all is saved, continue with --resume"
        return tmp_path / "out.checkpoints"

    return stopped


@pytest.fixture
def evaluated() -> Callable[[Path, Path], dict[str, Any]]:
    """A function: what `smidgen evaluate --json` says of a result on the rows of a file."""

    def evaluated(out: Path, rows: Path) -> dict[str, Any]:
        said = io.StringIO()
        evaluate(out, str(rows), model=None, console=Console(file=said), as_json=True)
        return json.loads(said.getvalue())

    return evaluated
