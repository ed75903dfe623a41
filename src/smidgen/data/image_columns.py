"""Which column holds the images, and which the labels.  What is not clear is not guessed."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from smidgen.core.errors import DataError
from smidgen.data.image_folder import FOLDER
from smidgen.data.images import is_image
from smidgen.data.table import Table

_LABELS = ("label", "labels", FOLDER, "class", "category", "target")  # the first that is there
_SAMPLE = 200  # values looked at


def image_column(table: Table, said: Mapping[str, str]) -> tuple[str, str]:
    """The column of images, and why.  Raises DataError if that is not clear."""
    if "image" in said:
        table.column(said["image"])
        return said["image"], ""
    found = [name for name, values in table.columns.items() if _mostly_images(values)]
    if len(found) == 1:
        return found[0], f'"{found[0]}" is the only column of images'
    what = f"{' and '.join(found)} all hold images" if found else "no column holds paths or bytes of images"
    raise DataError(
        f"the image column is not clear: {what}. Say which: --column image=NAME. Columns: {', '.join(table.names)}"
    )


def label_column(table: Table, image: str, said: Mapping[str, str]) -> tuple[str, str]:
    """The column of labels, and why.  Raises DataError if that is not clear."""
    if "label" in said:
        table.column(said["label"])
        return said["label"], ""
    if table.names == [image]:
        raise DataError(f"there are images and no labels at {table.where(0)}: put them into folders named by class")
    others = [name for name in table.names if name != image]
    named = [name for name in _LABELS if name in others]
    if named:
        why = "the folder that an image lies in" if named[0] == FOLDER else f'"{named[0]}" is a usual name for labels'
        return named[0], why
    if len(others) == 1:
        return others[0], "the only other column"
    raise DataError(
        f"the label column is not clear: none is called {', '.join(_LABELS)}. Say which: --column label=NAME. "
        f"Columns: {', '.join(table.names)}"
    )


def _mostly_images(values: Sequence[Any]) -> bool:
    some = list(islice((value for value in values if value not in (None, "")), _SAMPLE))
    return bool(some) and 2 * sum(map(is_image, some)) > len(some)
