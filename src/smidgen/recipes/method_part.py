"""MethodPart: a method in a recipe.  Its keys are fields of the method's dataclass; nothing else interprets them."""

import json
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from pydantic import ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails

from ..core.errors import ConfigError, TargetError
from ..core.method import Method, method_named
from .part import Part, finding, mistake


class MethodPart(Part):
    """A method by name; every other key is a field of that method, checked against the method's own types."""

    model_config = ConfigDict(extra="allow")

    name: str = "lora"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the method that were said, as plain data."""
        return dict(self.model_extra or {})

    def build(self) -> Method:
        """The method's own frozen dataclass."""
        method = method_named(self.name)
        return method(**_checked(method, self.settings))

    @model_validator(mode="after")
    def _is_a_method(self) -> Self:
        try:
            method = method_named(self.name)
        except ConfigError as error:
            raise mistake(("name",), str(error)) from error
        wrong: list[InitErrorDetails] = []
        settings = self.settings
        try:
            _checked(method, settings)
        except ValidationError as error:
            wrong = [_again(detail) for detail in error.errors(include_url=False)]
            settings = {name: value for name, value in settings.items() if all(d["loc"][0] != name for d in wrong)}
        try:
            method(**_checked(method, settings))  # what is left: may these values be?
        except (ConfigError, TargetError) as error:
            fields_named = [name for name in settings if str(error).startswith(name)]
            about = ["targets"] if isinstance(error, TargetError) else fields_named[:1]
            wrong.append(finding(tuple(about), str(error)))
        if wrong:
            raise ValidationError.from_exception_data("method", wrong)
        return self


def method_fields(method: type[Method]) -> list[str]:
    """The keys that a method takes, its own first."""
    names = [field.name for field in fields(method)]
    return sorted(names, key=lambda name: name in ("targets", "heads"))


def _checked(method: type[Method], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings as the values of a method's fields.  Raises pydantic's ValidationError naming every wrong one."""
    hints = typing.get_type_hints(method)
    places = str | tuple[str, ...]
    types = {name: places if name in ("targets", "heads") else hints[name] for name in method_fields(method)}
    config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    definitions: dict[str, Any] = {name: (hint, None) for name, hint in types.items()}
    model = create_model(method.name, __config__=config, **definitions)
    # through JSON, where a list is what a tuple is written as, and nothing else is converted
    checked = model.model_validate_json(json.dumps(settings))
    return {name: getattr(checked, name) for name in settings}


def _again(detail: ErrorDetails) -> InitErrorDetails:
    """One line of an error that was caught, to be raised with others."""
    return InitErrorDetails(type=detail["type"], loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {}))
