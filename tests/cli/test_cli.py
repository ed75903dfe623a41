"""The command line: what it passes on, how it ends, and that its help is quick."""

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from smidgen.cli.app import app
from smidgen.cli.tune import tune
from smidgen.core import errors
from smidgen.recipes.load import FLAGS, PAIRS

runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture
def calls(monkeypatch):
    """What `run` and `use` were asked for; an exception put into `calls.error` is raised instead."""
    seen = types.SimpleNamespace(made=[], error=None)

    def stub(name):
        def call(*args, **keywords):
            keywords.pop("console", None)
            seen.made.append((name, tuple(value for value in args if not isinstance(value, Console)), keywords))
            if seen.error is not None:
                raise seen.error
            return Path("out")

        return call

    for module, names in {"run": ("tune",), "demo": ("demo",), "use": ("predict", "evaluate", "merge")}.items():
        fake = types.ModuleType(f"smidgen.recipes.{module}")
        for name in names:
            setattr(fake, name, stub(name))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return seen


def command(*arguments, **environment):
    """`python -m smidgen` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "smidgen", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", **environment},
    )


def test_flags_become_a_recipe(calls):
    line = "--model m --data d.csv --batch 8 --learning-rate 2e-4 --shift tweets=t.csv --against full --method lora"
    more = "--set method.rank=4 --out o --resume --dry-run"
    done = runner.invoke(app, ["tune", *line.split(), *more.split()])
    assert done.exit_code == 0, done.output
    [(name, (recipe,), keywords)] = calls.made
    assert (name, keywords) == ("tune", {"resume": True, "fresh": False})
    assert (recipe.model.path, recipe.data.train, recipe.data.shift) == ("m", "d.csv", {"tweets": "t.csv"})
    assert (recipe.train.batch, recipe.train.learning_rate, recipe.report.against) == (8, 2e-4, ("full",))
    assert (recipe.method_object().rank, recipe.out, recipe.dry_run) == (4, Path("o"), True)


def test_every_flag_of_tune_is_a_key_of_a_recipe():
    names = {f"--{name.replace('_', '-')}" for name in inspect.signature(tune).parameters}
    assert names - {"--recipe", "--settings", "--resume", "--fresh"} == FLAGS.keys() | PAIRS.keys()


def test_each_flag_reaches_its_key(calls):
    values = {"--on-bad-row": "skip", "--task": "text_classification", "--method": "lora", "--against": "full"}
    values["--quantize"] = "nf4"
    values |= dict.fromkeys(("--epochs", "--minutes", "--batch", "--learning-rate", "--seed", "--max-length"), "3")
    values |= {"--top-layers": "3", "--replay": "disk"}
    for flag, key in FLAGS.items():
        said = [] if flag == "--dry-run" else [values.get(flag, "3" if flag == "--steps" else "word")]
        base = [part for name in ("--model", "--data") if name != flag for part in (name, "x")]
        done = runner.invoke(app, ["tune", *base, flag, *said])
        assert done.exit_code == 0, f"{flag}: {done.output}"
        value = calls.made[-1][1][0]
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        assert value not in (None, (), "x", False), flag


def test_a_recipe_file_and_flags_go_together(calls, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d.csv\ntrain: {seed: 1, batch: 4}\n")
    assert runner.invoke(app, ["tune", str(file), "--seed", "2", "--fresh"]).exit_code == 0
    [(_, (recipe,), keywords)] = calls.made
    assert (recipe.train.seed, recipe.train.batch, keywords["fresh"]) == (2, 4, True)


def test_tune_without_anything_shows_how_to_begin(calls):
    done = runner.invoke(app, ["tune"])
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "error: say what to tune and on what:\n\n    smidgen tune --model models/minilm --data"
    )
    assert calls.made == []


def test_all_mistakes_in_a_recipe_are_printed_without_a_traceback(calls, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d.csv\nmethod:\n  dropuot: 0.1\n")
    done = runner.invoke(app, ["tune", str(file), "--batch", "none"])
    assert done.exit_code == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(f'error: {file}:4: "dropuot" is not a field of lora. Did you mean "dropout"?')
    assert second == '--batch: train.batch is "none" (text); expected a whole number'
    assert calls.made == []


def test_resume_and_fresh_exclude_each_other(calls):
    done = runner.invoke(app, ["tune", "--model", "m", "--data", "d", "--resume", "--fresh"])
    assert (done.exit_code, done.stderr) == (
        2,
        "error: --resume continues a run and --fresh starts anew; say one of them\n",
    )


def test_the_other_verbs_pass_on_what_they_were_told(calls):
    for line in (
        "demo --out o --seed 3",
        "predict a --data d.csv --out p.csv --model m --task t.py:T",
        "predict a --text one --text two",
        "evaluate a --data d.csv --json",
        "merge a o --max-error 0.2 --dtype bfloat16",
        "merge a o",
    ):
        assert runner.invoke(app, line.split()).exit_code == 0, line
    assert calls.made == [
        ("demo", (Path("o"),), {"seed": 3}),
        ("predict", (Path("a"), "d.csv"), {"model": "m", "text": [], "out": Path("p.csv"), "task_file": "t.py:T"}),
        ("predict", (Path("a"), None), {"model": None, "text": ["one", "two"], "out": None, "task_file": None}),
        ("evaluate", (Path("a"), "d.csv"), {"model": None, "as_json": True, "task_file": None}),
        ("merge", (Path("a"), Path("o")), {"model": None, "max_error": 0.2, "dtype": "bfloat16", "task_file": None}),
        ("merge", (Path("a"), Path("o")), {"model": None, "max_error": 0.05, "dtype": None, "task_file": None}),
    ]


@pytest.mark.parametrize("arguments", [["predict", "a"], ["predict", "a", "--data", "d", "--text", "one"]])
def test_predict_wants_data_or_texts(calls, arguments):
    done = runner.invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (
        2,
        'error: say what to predict, and one of both: --data PATH, or --text "..."\n',
    )


FAILED_RUN = (
    errors.NonFiniteError,
    errors.PreflightError,
    errors.CheckpointError,
    errors.MergeError,
    errors.OutOfMemory,
)
ASKED_WRONGLY = sorted(set(errors.SmidgenError.__subclasses__()) - set(FAILED_RUN), key=lambda kind: kind.__name__)


@pytest.mark.parametrize(("kind", "code"), [(k, 1) for k in FAILED_RUN] + [(k, 2) for k in ASKED_WRONGLY])
def test_the_exit_code_says_whose_turn_it_is(calls, kind, code):
    calls.error = kind("what happened [and] why")
    done = runner.invoke(app, ["tune", "--model", "m", "--data", "d"])
    assert (done.exit_code, done.stderr) == (code, "error: what happened [and] why\n")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped\n"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: [Errno 28] No space left on device: 'out/x'\n"),
        (ModuleNotFoundError("", name="transformers"), 2,
         'error: the package transformers is needed and not installed: pip install "smidgen[text]"\n'),
    ],
)  # fmt: skip
def test_other_ends_are_one_line_too(calls, error, code, text):
    calls.error = error
    done = runner.invoke(app, ["tune", "--model", "m", "--data", "d"])
    assert (done.exit_code, done.stderr) == (code, text)


def test_a_bug_keeps_its_traceback(calls):
    calls.error = ZeroDivisionError("a bug")
    assert isinstance(runner.invoke(app, ["tune", "--model", "m", "--data", "d"]).exception, ZeroDivisionError)


def test_help_of_every_verb_can_be_read():
    for verb in ("tune", "predict", "evaluate", "inspect", "merge", "methods", "demo"):
        assert runner.invoke(app, [verb, "--help"]).exit_code == 0
        assert f" {verb} " in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["tune", "--help"]).output
    places = [text.index(f"─ {panel} ─") for panel in ("What", "Method", "Training", "Output")]
    assert places == sorted(places)
    assert text.count("the plan chooses") >= 8
    assert "smidgen tune --model models/minilm --data reviews.csv" in text


def test_a_misspelt_flag_names_the_right_one():
    done = runner.invoke(app, ["tune", "--modle", "m"])
    assert done.exit_code == 2
    assert "--model" in done.stderr


def test_a_wrong_model_is_one_line_in_a_shell():
    done = command("inspect", "no/such/model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no folder no/such/model.")
    assert "Traceback" not in done.stderr


def test_debugging_shows_the_traceback_too():
    done = runner.invoke(app, ["inspect", "no/such/model"], env={"SMIDGEN_DEBUG": "1"})
    assert done.exit_code == 2
    assert done.stderr.startswith("Traceback")
    assert "\nerror: there is no folder no/such/model." in done.stderr


def test_help_imports_none_of_the_heavy_packages():
    code = (
        "import sys, json\n"
        "sys.argv = ['smidgen', '--help']\n"
        "from smidgen.cli.main import main\n"
        "try: main()\n"
        "finally: print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "smidgen tune --model" in done.stdout
    loaded = set(json.loads(done.stderr))
    assert not loaded & {"transformers", "datasets", "pyarrow", "pydantic", "yaml", "smidgen.recipes.schema"}


def test_a_missing_typer_is_one_line(tmp_path):
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("raise ModuleNotFoundError(name='typer')")
    done = command("methods", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        2,
        'error: the package typer is needed and not installed: pip install "smidgen[text]"\n',
    )
