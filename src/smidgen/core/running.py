"""Running: what the adapters of one name tell each other while a call runs."""

from typing import Any


class Running:
    """A value of the call that is running; part of no copy and of no file.

    It stays until the next call: under gradient checkpointing layers run once more in the backward.
    """

    value: Any = None

    def __reduce__(self) -> Any:
        return Running, ()
