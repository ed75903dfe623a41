"""What a method's settings may be: the checks that many methods have.  Each raises ConfigError naming the setting.

Where the method has `<name>_pattern`, other values by site, these are held to the same.
None is left alone where it is the setting's default.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import require


def require_whole(settings: object, *names: str, least: int = 1) -> None:
    """Whole numbers of at least `least`."""
    for name, value, or_none in _values(settings, names):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        require(whole, f"{name} is {value}; it must be a whole number of at least {least}{or_none}")


def require_finite(settings: object, *names: str) -> None:
    """Numbers that are neither infinite nor nan."""
    for name, value, or_none in _values(settings, names):
        require(math.isfinite(value), f"{name} is {value}; it must be a finite number{or_none}")


def require_above_zero(settings: object, *names: str) -> None:
    """Finite numbers above 0."""
    for name, value, or_none in _values(settings, names):
        require(0 < value < math.inf, f"{name} is {value}; it must be a finite number above 0{or_none}")


def require_share(settings: object, *names: str) -> None:
    """At least 0 and below 1, such as a probability of dropout."""
    for name, value, or_none in _values(settings, names):
        require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1{or_none}")


def require_schedule(settings: Any) -> None:
    """`hold` and `settle`, shares of the steps at the start and at the end, leave some; `smoothing` is two numbers."""
    hold, settle, smoothing = settings.hold, settings.settle, settings.smoothing
    some = hold >= 0 and settle >= 0 and hold + settle < 1
    require(some, f"hold and settle are {hold} and {settle}; they must be shares of the steps that leave some between")
    betas = len(smoothing) == 2 and all(0 < beta < 1 for beta in smoothing)
    require(betas, f"smoothing is {smoothing}; it must be two numbers between 0 and 1")


def require_one_of(settings: object, name: str, known: Iterable[str]) -> None:
    """One of these words."""
    known = tuple(known)
    for _, value, or_none in _values(settings, (name,)):
        require(value in known, f'{name} is "{value}"; it is one of {", ".join(known)}{or_none}')


def _values(settings: object, names: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    """Each value with its setting's name and what a message says of None."""
    for name in names:
        or_none = ", or None" if getattr(type(settings), name, 0) is None else ""
        for value in (getattr(settings, name), *getattr(settings, f"{name}_pattern", {}).values()):
            if value is not None or not or_none:
                yield name, value, or_none
