"""Tasks by name: `tasks/NAME.py` of ours, those of other packages (entry point group `smidgen.tasks`), and by file."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TypeVar, cast

from ..core.errors import RecipeError, nearest
from .base import Task
from .own.python_file import names_file

Builder = TypeVar("Builder", bound=type[Task])

_TASKS: dict[str, type[Task]] = {}
_OURS = __package__


def task(name: str) -> Callable[[Builder], Builder]:
    """Enter a task in the table under `name`."""

    def enter(cls: Builder) -> Builder:
        cls.name = name
        _TASKS[name] = cls
        return cls

    return enter


def tasks() -> dict[str, type[Task]]:
    """All tasks by name, those of other packages included."""
    from importlib.metadata import entry_points  # here: only listing needs it

    for found in iter_modules(import_module(_OURS).__path__):
        import_module(f"{_OURS}.{found.name}")
    for entry in entry_points(group="smidgen.tasks"):
        if entry.name not in _TASKS:
            _TASKS[entry.name] = cast("type[Task]", entry.load())
    return dict(sorted(_TASKS.items()))


def task_named(name: str) -> type[Task]:
    """The task of this name.  Raises RecipeError naming the nearest."""
    if name not in _TASKS and name.isidentifier() and find_spec(f"{_OURS}.{name}"):
        import_module(f"{_OURS}.{name}")
    known = _TASKS if name in _TASKS else tasks()
    if name not in known:
        near = nearest(name, known)
        mean = f'Did you mean "{near[0]}"? ' if near else ""
        raise RecipeError(f'there is no task "{name}". {mean}There are: {", ".join(known)}')
    return known[name]


def task_said(said: str) -> type[Task]:
    """The task of this name, or of FILE.py:NAME, which is run: for the user's own words, never for a saved result's.

    Raises RecipeError.
    """
    if names_file(said):
        from .own.in_file import task_in_file  # which is entered in the table itself

        return task_in_file(said)
    return task_named(said)
