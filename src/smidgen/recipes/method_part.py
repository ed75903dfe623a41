"""MethodPart and TaskPart: a method and a task in a recipe.

Their keys are the fields of the method's or the task's own dataclass; nothing else interprets them.
"""

import json
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from pydantic import ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails

from ..core.errors import ConfigError, RecipeError, TargetError
from ..core.method import Method, method_named
from ..data.labels import Kind
from ..tasks.registry import task_said
from .part import Part, finding, mistake

_PLACES = ("targets", "heads")  # of a method: patterns of module names


class NamedPart(Part):
    """Something by name; every other key is a field of its dataclass, checked against the dataclass's own types."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that were said, as plain data."""
        return dict(self.model_extra or {})


class MethodPart(NamedPart):
    """A method by name, with fields of that method."""

    name: str = "lora"

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
        _raise_what_is_wrong(method, self.settings)
        return self


class TaskPart(NamedPart):
    """A task by name, with fields of that task's `Settings`."""

    name: str = "text_classification"

    def build(self) -> Any:
        """The task's settings, its own frozen dataclass."""
        kind = task_said(self.name).Settings
        return kind(**_checked(kind, self.settings))

    @model_validator(mode="after")
    def _is_a_task(self) -> Self:
        try:
            settings = task_said(self.name).Settings
        except RecipeError as error:
            said = str(error)
            if self.name in typing.get_args(Kind):
                said = f'there is no task "{self.name}". It is a kind of text_classification: task.kind: {self.name}'
            raise mistake(("name",), said) from error
        _raise_what_is_wrong(settings, self.settings)
        return self


def method_fields(method: type[Method]) -> list[str]:
    """The keys that a method takes, its own first."""
    return _fields(method)


def task_fields(name: str) -> list[str]:
    """The keys that a task takes.  Raises RecipeError."""
    return _fields(task_said(name).Settings)


def _fields(owner: type) -> list[str]:
    names = [field.name for field in fields(owner)]
    return sorted(names, key=lambda name: name in _PLACES)


def _raise_what_is_wrong(owner: type, settings: dict[str, Any]) -> None:
    """Raise pydantic's ValidationError naming every setting that cannot be."""
    wrong: list[InitErrorDetails] = []
    try:
        _checked(owner, settings)
    except ValidationError as error:
        wrong = [_again(detail) for detail in error.errors(include_url=False)]
        settings = {name: value for name, value in settings.items() if all(d["loc"][0] != name for d in wrong)}
    try:
        owner(**_checked(owner, settings))  # what is left: may these values be?
    except (ConfigError, TargetError) as error:
        fields_named = [name for name in settings if str(error).startswith(name)]
        about = ["targets"] if isinstance(error, TargetError) else fields_named[:1]
        wrong.append(finding(tuple(about), str(error)))
    if wrong:
        raise ValidationError.from_exception_data(owner.__name__, wrong)


def _checked(owner: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings as the values of a dataclass's fields.  Raises pydantic's ValidationError naming the wrong."""
    hints = typing.get_type_hints(owner)
    places = str | tuple[str, ...]
    types = {name: places if name in _PLACES and issubclass(owner, Method) else hints[name] for name in _fields(owner)}
    config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    definitions: dict[str, Any] = {name: (hint, None) for name, hint in types.items()}
    model = create_model(owner.__name__, __config__=config, **definitions)
    # through JSON, where a list is what a tuple is written as, and nothing else is converted
    checked = model.model_validate_json(json.dumps(settings))
    return {name: getattr(checked, name) for name in settings}


def _again(detail: ErrorDetails) -> InitErrorDetails:
    """One line of an error that was caught, to be raised with others."""
    return InitErrorDetails(type=detail["type"], loc=detail["loc"], input=detail["input"], ctx=detail.get("ctx", {}))
