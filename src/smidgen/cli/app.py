"""The verbs.  Each is a page of help and one call; what a call needs is imported when it is made."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from ..core.errors import RecipeError
from .reporting import reporting
from .tune import tune

_EXAMPLES = """[bold]Examples[/bold]

smidgen demo

smidgen tune --model models/minilm --data reviews.csv

smidgen predict out/reviews --text "a lovely film"

smidgen methods --model models/minilm
"""


class _Verbs(TyperGroup):
    """Errors end every verb alike."""

    def invoke(self, ctx: Any) -> Any:
        with reporting():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Verbs,
    epilog=_EXAMPLES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder that tune wrote.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The base model, where it is not the one that the adapter names."),
]

TaskFile = Annotated[
    str | None,
    typer.Option("--task", metavar="FILE.py:NAME", help="Your own task, if it was tuned for one; the file is run."),
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"smidgen {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Adapt a pre-trained model to your data by training a smidgen of its parameters."""


app.command("tune", rich_help_panel="Tune")(tune)


@app.command("demo", rich_help_panel="Tune")
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the result goes.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")] = 0,
) -> None:
    """Tune a small model on real reviews and show what it learned."""
    from ..recipes.demo import demo as run

    run(Console(), out, seed=seed)


@app.command("predict", rich_help_panel="Use")
def predict(
    adapter: Adapter,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Rows to predict: a file or folder.")] = None,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text to predict; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the predictions here, not on screen.")] = None,
    model: Model = None,
    task: TaskFile = None,
) -> None:
    """Predict with a tuned model, for rows of a file or for texts on the command line."""
    if (data is None) == (not text):
        raise RecipeError('say what to predict, and one of both: --data PATH, or --text "..."')
    from ..recipes.use import predict as run

    run(adapter, data, model=model, text=text or [], out=out, console=Console(), task_file=task)


@app.command("chat", rich_help_panel="Use")
def chat(
    adapter: Adapter,
    base: Annotated[
        bool, typer.Option("--base", metavar="", help="Let the base model answer too, for comparison.")
    ] = False,
    model: Model = None,
) -> None:
    """Talk to a tuned language model."""
    from ..recipes.chat import chat as run

    run(adapter, model=model, base=base, console=Console(), lines=_Lines())


class _Lines:
    """What is typed, line by line, or what comes through a pipe; asked again after Ctrl-C."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            raise StopIteration from None


@app.command("evaluate", rich_help_panel="Use")
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(metavar="PATH", help="Rows with labels: a file or folder.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON for a program to read.")] = False,
    model: Model = None,
    task: TaskFile = None,
) -> None:
    """Measure a tuned model on rows with labels."""
    from ..recipes.use import evaluate as run

    run(adapter, data, model=model, console=Console(), as_json=json, task_file=task)


@app.command("merge", rich_help_panel="Use")
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.", show_default=False)],
    max_error: Annotated[
        float,
        typer.Option(min=0, metavar="SHARE", help="How much of the adapter's change may be lost to rounding."),
    ] = 0.05,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.", show_default="that of the base model"),
    ] = None,
    model: Model = None,
    task: TaskFile = None,
) -> None:
    """Write the base model with the adapter merged into its weights, as a model of its own."""
    from ..recipes.use import merge as run

    run(adapter, out, model=model, max_error=max_error, dtype=dtype, console=Console(), task_file=task)


@app.command("convert", rich_help_panel="Use")
def convert(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="An adapter folder: ours or HF PEFT's.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted one.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The base model: a folder, a package or a name.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option(metavar="WHAT", help="same: the same method. lora: a plain LoRA that does the same.")
    ] = "same",
    rank: Annotated[
        int | None, typer.Option(min=1, metavar="R", help="Rank of the LoRA.", show_default="as many as it takes")
    ] = None,
) -> None:
    """Rewrite an adapter folder as HF PEFT reads it, or as a plain LoRA for servers that know only that."""
    from ..recipes.convert import convert as run

    run(folder, out, model=model, to=to, rank=rank, console=Console())


@app.command("inspect", rich_help_panel="Look")
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="A model, an adapter folder or a checkpoint.", show_default=False)
    ],
) -> None:
    """Show what a model, an adapter folder or a checkpoint is made of; no weights are loaded."""
    from ..recipes.inspect import inspect as run

    run(what, Console())


@app.command("methods", rich_help_panel="Look")
def methods(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also: how many parameters each would train on this model.")
    ] = None,
) -> None:
    """List the methods with their formulas and papers."""
    from ..recipes.inspect import list_methods

    list_methods(Console(), model)
