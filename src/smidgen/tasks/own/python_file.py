"""Code that the user names by file: FILE.py:NAME, a function that makes a model, or a task of one's own.

It is run, so it is taken from the command line or the user's own recipe alone, and never from a saved result.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ...core.errors import RecipeError, nearest


def names_file(said: str) -> bool:
    """True for FILE.py:NAME."""
    return ".py:" in said


def object_in_file(said: str) -> Any:
    """What FILE.py calls NAME.  Raises RecipeError if there is no such file or name, or the file fails.

    Its folder is added at the end of sys.path, so that it can import its neighbours, as `python FILE.py` can.
    """
    file, _, name = said.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise RecipeError(f"{said}: there is no file {file}")
    key = f"smidgen_user_{path.stem}_{abs(hash(str(path.resolve())))}"
    if key in sys.modules:
        module = sys.modules[key]
    else:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses look their module up by name
        if (folder := str(path.resolve().parent)) not in sys.path:
            sys.path.append(folder)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[key]
            raise RecipeError(f"{said}: {file} fails when it is run: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        near = nearest(name, [n for n in vars(module) if not n.startswith("_")])
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"{said}: {file} has no {name}.{hint}")
    return getattr(module, name)
