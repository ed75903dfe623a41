"""The task that a file of the user's says: a class derived from `Task`, or a function that returns `Pieces`."""

import functools
from collections.abc import Callable
from typing import Any

from ...core.errors import RecipeError
from ..base import Task
from ..custom import Custom
from .maker import Maker
from .python_file import names_file, object_in_file


def task_in_file(said: str) -> type[Task]:
    """The task that FILE.py:NAME says; the file is run.  Raises RecipeError."""
    found = object_in_file(said)
    if isinstance(found, type) and issubclass(found, Task):
        missing = sorted(found.__abstractmethods__) + [
            name for name in ("summary", "Settings", "roles") if not hasattr(found, name)
        ]
        if missing:
            raise RecipeError(f"{said} is a Task without {', '.join(missing)}")
        if "name" not in vars(found):
            found.name = Custom.name  # not what it inherits: its results are not those of another task
        return found
    if isinstance(found, type) or not callable(found):
        kind = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise RecipeError(f"{said} is {kind}; it is to be a function that returns Pieces, or a class derived from Task")
    return _bound(said, found)


def brings_model_and_data(said: str) -> bool:
    """True for FILE.py:NAME of a function, whose `Pieces` have all that a run needs."""
    try:
        return names_file(said) and issubclass(cls := task_in_file(said), Custom) and cls.file == said
    except RecipeError:
        return False


@functools.cache
def _bound(said: str, maker: Callable[[], Any]) -> type[Custom]:
    return type("Custom", (Custom,), {"file": said, "maker": Maker(said, maker)})
