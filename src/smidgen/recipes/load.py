"""From a YAML file, flags and settings to a Recipe; every mistake at once, each with its line or its flag.

    recipe.yaml:7: "dropuot" is not a field of lora. Did you mean "dropout"? Fields: rank, alpha, ...
    --learning-rate: train.learning_rate is "fast" (text); expected a number

Flags win over the file, and `--set` over both.  Paths in a recipe are seen from where the command runs.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..core.errors import RecipeError, nearest
from .explain import explain, shown
from .method_part import MethodPart
from .schema import SHORT, Recipe, spelled_out
from .yaml_text import Loc, read_scalar, read_yaml

FLAGS = {  # flag -> key
    "--model": "model.path",
    "--data": "data.train",
    "--valid": "data.valid",
    "--test": "data.test",
    "--text-column": "data.columns.text",
    "--text-pair-column": "data.columns.text_pair",
    "--label-column": "data.columns.label",
    "--on-bad-row": "data.on_bad_row",
    "--cache": "data.cache",
    "--quantize": "model.quantize",
    "--task": "task.name",
    "--max-length": "task.max_length",
    "--method": "method.name",
    "--epochs": "train.epochs",
    "--steps": "train.steps",
    "--minutes": "train.minutes",
    "--batch": "train.batch",
    "--learning-rate": "train.learning_rate",
    "--seed": "train.seed",
    "--top-layers": "train.top_layers",
    "--replay": "train.replay",
    "--against": "report.against",
    "--out": "out",
    "--dry-run": "dry_run",
}
PAIRS = {  # flag that may be repeated -> key, what it takes, an example
    "--shift": ("data.shift", "NAME=PATH", "tweets=tweets.csv"),
    "--column": ("data.columns", "ROLE=NAME", "label=stars"),
}
_NUMBERS = ("--max-length", "--epochs", "--steps", "--minutes", "--batch", "--learning-rate", "--seed", "--top-layers")
_MAX_BYTES = 1 << 20  # of a recipe file


class _Place(NamedTuple):
    """Where something was said: what an error begins with, and the line that errors are sorted by."""

    name: str
    line: int = sys.maxsize


def load_recipe(
    path: str | Path | None = None, *, flags: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> Recipe:
    """The recipe in a file, with flags and settings put over it; without a file, of these alone.

    flags: those that were given, named as in FLAGS or PAIRS, with their text; those in PAIRS have a list of NAME=TEXT.
    settings: KEY=VALUE, such as "train.batch=8".   Raises RecipeError naming every mistake.
    """
    sheet = _Sheet(_Place(str(path) if path else "the command line", 0))
    if path is not None:
        sheet.read(Path(path))
    for flag, value in (flags or {}).items():
        sheet.take_flag(flag, value)
    for setting in settings:
        sheet.take_setting(setting)
    return sheet.recipe()


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """The recipe that plain data describe.  Raises RecipeError naming every mistake."""
    sheet = _Sheet(_Place("recipe", 0))
    sheet.values = spelled_out(values)
    return sheet.recipe()


class _Sheet:
    """Values as they are gathered, where each was said, and what is wrong so far."""

    def __init__(self, whole: _Place) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Loc, _Place] = {(): whole}
        self.mistakes: list[tuple[_Place, str]] = []

    def read(self, path: Path) -> None:
        """Take what a file says.  Raises RecipeError if nothing can be made of it."""
        document = read_yaml(_text_of(path))
        self.mistakes = [(_Place(f"{path}:{line}", line), text) for line, text in document.mistakes]
        if not isinstance(document.values, dict):
            there = "nothing" if document.values is None else shown(document.values)
            self._raise(f"{path} holds {there}; a recipe is keys with values:\nmodel: PATH\ndata: PATH")
        self.values = spelled_out(document.values)
        self.places |= {loc: _Place(f"{path}:{line}", line) for loc, line in document.lines.items()}

    def take_flag(self, flag: str, value: Any) -> None:
        """Take what one flag says."""
        if flag in PAIRS:
            key, form, example = PAIRS[flag]
            for pair in value:
                name, _, text = pair.partition("=")
                if name and text:
                    self._put((*key.split("."), name), text, _Place(f"{flag} {name}"))
                else:
                    self.mistakes.append((_Place(flag), f'"{pair}" is not {form}, such as {example}'))
        else:
            said = read_scalar(value) if flag in _NUMBERS else value
            self._put(tuple(FLAGS[flag].split(".")), said, _Place(flag))

    def take_setting(self, setting: str) -> None:
        """Take what one `--set` says."""
        key, sign, text = setting.partition("=")
        if sign and all(key.split(".")):
            loc = (key, SHORT[key]) if key in SHORT else tuple(key.split("."))
            self._put(loc, read_scalar(text), _Place(f"--set {key}"))
        else:
            self.mistakes.append((_Place("--set"), f'"{setting}" is not KEY=VALUE, such as train.batch=8'))

    def recipe(self) -> Recipe:
        """The recipe.  Raises RecipeError with all that is wrong."""
        try:
            recipe = Recipe.model_validate(self.values)
        except ValidationError as error:
            self.mistakes += [(self._place(loc), text) for loc, text in explain(error, self.values, FLAGS)]
        if self.mistakes:
            self._raise("")
        return recipe

    def _put(self, loc: tuple[str, ...], value: Any, place: _Place) -> None:
        method = self.values.get("method")
        if loc == ("method", "name") and isinstance(method, dict) and method.get("name", MethodPart().name) != value:
            self._forget(("method",))  # another method has other fields
            del self.values["method"]
        inside: Any = self.values
        for depth, key in enumerate(loc[:-1], start=1):
            inside = inside.setdefault(key, {})
            if not isinstance(inside, dict):
                self.mistakes.append((place, f"{'.'.join(loc[:depth])} is {shown(inside)}; it has no {loc[depth]}"))
                return
        self._forget(loc)
        inside[loc[-1]] = value
        self.places[loc] = place

    def _forget(self, loc: Loc) -> None:
        self.places = {known: place for known, place in self.places.items() if known[: len(loc)] != loc}

    def _place(self, loc: Loc) -> _Place:
        """Where `loc` was said: itself, else something in it, else what it is in."""
        inside = [place for known, place in self.places.items() if loc and known[: len(loc)] == loc]
        around = [self.places[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in self.places]
        return self.places[loc] if loc in self.places else (inside + around)[0]

    def _raise(self, otherwise: str) -> None:
        ordered = sorted(self.mistakes, key=lambda found: found[0].line)
        raise RecipeError("\n".join(f"{place.name}: {text}" for place, text in ordered) or otherwise)


def _text_of(path: Path) -> str:
    if not path.is_file():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, there) or sorted(name for name in there if name.endswith((".yaml", ".yml")))[:5]
        hint = f" Near it: {', '.join(str(path.parent / name) for name in near)}." if near else ""
        raise RecipeError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; a recipe is a YAML file.{hint}")
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RecipeError(f"{path} is larger than {_MAX_BYTES:,} bytes; a recipe is a small YAML file")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
