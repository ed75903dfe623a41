"""Every exception of smidgen.  All derive from SmidgenError, so one `except` catches what is ours and nothing else.

    SmidgenError
    ├── ConfigError           a method or composition was given settings that cannot be
    ├── TargetError           no such place in the model, or a place the method cannot act on
    ├── AttachError           adapters cannot be put on, taken off, named or switched like that
    ├── NotMergeable          the adapter changes activations, not weights
    ├── MergeError            merging would lose more of the update than allowed, or give a wrong or non-finite weight
    ├── FolderError           an adapter folder cannot be read, or does not fit this model
    ├── RecipeError           the recipe or the command line asks for something that cannot be
    ├── DataError             the data cannot be read, or rows are wrong
    ├── ModelError            the model cannot be found or loaded
    ├── PreflightError        the checks before the run found that it would fail or learn nothing
    ├── NonFiniteError        a loss, gradient or adapter tensor stopped being finite during training
    ├── OutOfMemory           not even one row at a time fits in memory
    ├── CheckpointError       no whole checkpoint to resume from, or it belongs to another run
    └── MissingDependency     a package is needed that is not installed; names the extra that brings it

A message says what was asked, what is there, and what to do.  `docs/errors.md` lists them with examples.
"""

from collections.abc import Iterable


class SmidgenError(Exception):
    """Anything that smidgen refuses; the text is meant for the person who asked."""


class ConfigError(SmidgenError):
    """A method or composition was given settings that cannot be."""


class TargetError(SmidgenError):
    """No such place in the model, or a place that the method cannot act on."""


class AttachError(SmidgenError):
    """Adapters cannot be put on, taken off, named or switched like that."""


class NotMergeable(SmidgenError):
    """The adapter changes activations, not weights, so there is no weight to merge it into."""


class MergeError(SmidgenError):
    """Merging would lose more of the update than allowed, or give a wrong or non-finite weight."""


class FolderError(SmidgenError):
    """An adapter folder cannot be read, or does not fit this model."""


class RecipeError(SmidgenError):
    """The recipe or the command line asks for something that cannot be."""


class DataError(SmidgenError):
    """The data cannot be read, or rows are wrong."""


class ModelError(SmidgenError):
    """The model cannot be found or loaded."""


class PreflightError(SmidgenError):
    """The checks before the run found that it would fail or learn nothing."""


class NonFiniteError(SmidgenError):
    """A loss, gradient or adapter tensor stopped being finite during training."""


class OutOfMemory(SmidgenError):
    """Not even one row at a time fits in memory."""


class CheckpointError(SmidgenError):
    """No whole checkpoint to resume from, or it belongs to another run."""


class MissingDependency(SmidgenError):
    """A package is needed that is not installed; the message names the extra that brings it."""


def require(condition: bool, message: str, error: type[SmidgenError] = ConfigError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)


def reason(error: Exception) -> str:
    """The first line of what a library's error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `word`, best first; empty if none is near."""
    import difflib  # here: only a message needs it

    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
