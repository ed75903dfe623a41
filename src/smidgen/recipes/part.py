"""Part: a mapping of the recipe, and how its checks say what is wrong with it."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

MISTAKE = "mistake"  # the error type of our own checks, whose text is meant for the user as it is
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, str_min_length=1)


class Part(BaseModel):
    """A mapping of the recipe.  Unknown keys are refused, and nothing is converted silently: "8" is not 8."""

    model_config = STRICT


def mistake(loc: tuple[str, ...], text: str) -> ValidationError:
    """Our own finding about the key at `loc`, for a validator to raise."""
    return mistakes([(loc, text)])


def mistakes(found: Iterable[tuple[tuple[str, ...], str]]) -> ValidationError:
    """Several findings at once."""
    return ValidationError.from_exception_data("recipe", [finding(loc, text) for loc, text in found])


def finding(loc: tuple[str, ...], text: str) -> InitErrorDetails:
    """One finding, to be raised with others."""
    return InitErrorDetails(type=PydanticCustomError(MISTAKE, text), loc=loc, input=None)
