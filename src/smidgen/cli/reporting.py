"""How a command ends when it cannot go on: a message without traceback, and an exit code that says whose turn it is.

    1     a run failed: numbers that are not finite, checks before training, memory, a checkpoint, a merge, the disk
    2     what was asked cannot be: recipe, flags, data, model, adapter folder, a missing package
    130   Ctrl-C

SMIDGEN_DEBUG=1 shows the traceback too.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import CheckpointError, MergeError, NonFiniteError, OutOfMemory, PreflightError, SmidgenError

_RUN_FAILED = (NonFiniteError, PreflightError, CheckpointError, MergeError, OutOfMemory)


@contextmanager
def reporting() -> Iterator[None]:
    """Print what our own errors, the system's and Ctrl-C say, and exit; a bug keeps its traceback."""
    try:
        yield
    except SmidgenError as error:
        _end(str(error), 1 if isinstance(error, _RUN_FAILED) else 2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "smidgen":
            raise
        _end(f'the package {error.name} is needed and not installed: pip install "smidgen[text]"', 2)
    except BrokenPipeError:  # the reader of our output had enough
        raise
    except OSError as error:
        _end(str(error), 1)
    except KeyboardInterrupt as stop:
        _end(str(stop) or "stopped", 130)


def _end(text: str, code: int) -> None:
    if os.environ.get("SMIDGEN_DEBUG") == "1":
        traceback.print_exc()
    prefix = "\033[1;31merror:\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(text if code == 130 else f"{prefix} {text}", file=sys.stderr)
    raise SystemExit(code)
