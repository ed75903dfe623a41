"""The command `smidgen`.  What it needs is imported when it runs, so that a missing package is an error in one line."""

from .reporting import reporting


def main() -> None:
    """Run the command line; ends the process with 0, 1 (a run failed), 2 (asked wrongly) or 130 (Ctrl-C)."""
    with reporting():
        from .app import app

        app(prog_name="smidgen")
