"""Images with boxes: the folders of YOLO, and COCO's JSON.

    data.yaml                                    names, and where train, val and test are
    folder/images/*.jpg, folder/labels/*.txt     also images/train, images/val ...; a line is: class cx cy width height,
                                                 or a polygon, class x1 y1 x2 y2 x3 y3 ..., whose bounding box is taken
    instances_train.json                         COCO; boxes are x, y, width, height in pixels
    folder/annotations/instances_train.json ...  several of them by part, named by it
    folder/*.jpg                                 images alone, to be predicted

Every format becomes the same columns: "image", a path, and "boxes", a list of `Box`, whose class is a name and
whose numbers are shares of the width and height of the image as it is seen: turned upright, as EXIF says.  A wrong line
makes its image a Problem, so does a size in COCO's JSON that is of the image before it was turned; crowds of COCO
(iscrowd) are left out.

Columns that say which images are frames of one video: "folder", where the image is; "video", its file's name without
the number at the end ("street_0041.jpg": "street"); and what COCO's JSON says of its images, such as "video_id".
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smidgen.core.errors import DataError, MissingDependency
from smidgen.data.images import SUFFIXES, image_size
from smidgen.data.read import split_name
from smidgen.data.table import Problem, Table

IMAGE, BOXES = "image", "boxes"
FOLDER, VIDEO = "folder", "video"
_FRAME = re.compile(r"[-_. ]*\d+$")
_OF_ONE_IMAGE = {"id", "file_name", "width", "height", "license", "coco_url", "flickr_url", IMAGE, BOXES}
_SLACK = 0.005  # of the image, by which rounding may carry a box over its edge
_PARTS = ("train", "val", "test")  # keys of data.yaml

Result = tuple[dict[str, Table], list[Problem]]
Row = tuple[str, list["Box"], Mapping[str, Any]]  # the image, its boxes, what else is said of it


class Box(NamedTuple):
    """A class by name and its box: centre and size, as shares of the image.

    is_outline: it was a polygon, and is the smallest box that holds it.
    """

    name: str
    cx: float
    cy: float
    width: float
    height: float
    is_outline: bool = False


def read_boxes(where: str) -> Result:
    """The tables at a place by part, and the images that cannot be used with file and line.  Raises DataError."""
    path = Path(where).expanduser()
    if path.is_dir():
        tables, problems = _read_folder(path)
    elif not path.is_file():
        raise DataError(f"there is no file or folder {where}")
    elif path.suffix.lower() in (".yaml", ".yml"):
        tables, problems = _read_yaml(path)
    elif path.suffix.lower() == ".json":
        tables, problems = _read_coco({_part(path.stem): [path]})
    elif path.suffix.lower() in SUFFIXES:
        tables, problems = {"train": Table({IMAGE: [where], BOXES: [[]]}, [where])}, []
    else:
        raise DataError(
            f"{where} is no data.yaml, no JSON of COCO and no image; boxes are read from these, or a folder"
        )
    if not any(map(len, tables.values())):
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        raise DataError(f"{where} has no image that can be used ({len(problems)} bad ones).{shown}")
    if len(tables) == 1 and "train" not in tables:  # one part of a set, read by itself
        tables = {"train": next(iter(tables.values()))}
    return tables, problems


def _read_folder(folder: Path) -> Result:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (folder / name).is_file():
            return _read_yaml(folder / name)
    if annotations := sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")]):
        parts: dict[str, list[Path]] = defaultdict(list)
        for file in annotations:
            parts[_part(file.stem)].append(file)
        return _read_coco(parts)
    images = folder / "images" if (folder / "images").is_dir() else folder
    names = _lines(folder / "classes.txt") if (folder / "classes.txt").is_file() else None
    below = {part: sub for sub in sorted(images.iterdir()) if sub.is_dir() and (part := split_name(sub.name))}
    return _read_yolo({str(part): [sub] for part, sub in below.items()} or {"train": [images]}, names)


def _part(name: str) -> str:
    return str(split_name(name.rstrip("0123456789")) or "train")  # instances_train2017


# -- YOLO -----------------------------------------------------------------------------------------------------------
def _read_yaml(file: Path) -> Result:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency(f'PyYAML is needed to read {file}: pip install "smidgen[vision]"') from error
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict) or "train" not in said:
        raise DataError(f"{file} does not say where `train` is; it is to say names, train and val")
    if "kpt_shape" in said:  # with few points a line looks like a polygon
        raise DataError(
            f"{file} is of key points (kpt_shape), which are not learned here: keep the first 5 columns of each line, "
            "class cx cy width height, and take kpt_shape out"
        )
    root = file.parent / str(said.get("path") or "")
    places = {part: said[part] if isinstance(said[part], list) else [said[part]] for part in _PARTS if said.get(part)}
    names = said.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(f"{file}: the keys of `names` are {sorted(names)}; they are to be 0, 1, 2 ...")
        names = [names[i] for i in range(len(names))]
    if names is not None and not isinstance(names, list):
        raise DataError(f"{file}: `names` is {names!r}; it is a list of the classes")
    found = {str(split_name(part)): [_place(root, str(place)) for place in listed] for part, listed in places.items()}
    return _read_yolo(found, None if names is None else list(map(str, names)))


def _place(root: Path, said: str) -> Path:
    """Where a part is.  Roboflow writes ../train/images for a folder beside data.yaml, as ultralytics reads it too."""
    place, beside = root / said, root / said.removeprefix("../")
    return beside if beside.exists() and not place.exists() else place


def _read_yolo(parts: Mapping[str, Sequence[Path]], names: Sequence[str] | None) -> Result:
    """parts: folders of images, or files that list images.   names: None calls classes by their numbers."""
    tables: dict[str, Table] = {}
    problems: list[Problem] = []
    for part, places in parts.items():
        rows: list[Row] = []
        for image in (image for place in places for image in _images(place, problems)):
            label, boxes, wrong = _label_of(image), list[Box](), list[Problem]()
            for number, line in enumerate(_lines(label) if label.is_file() else [], start=1):
                try:
                    boxes += [_yolo_box(line, names)] if line.strip() else []
                except DataError as error:
                    wrong.append(Problem(f"{label}:{number}", str(error)))
            problems += wrong
            if not wrong:
                rows.append((str(image), boxes, {}))
        tables[part] = _table(rows)
    return tables, problems


def _images(place: Path, problems: list[Problem]) -> list[Path]:
    """The images of a folder, or those that a file lists; what is missing is entered among the problems."""
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
        stems = {_label_of(image) for image in found}
        labels = {file for folder in {label.parent for label in stems} for file in folder.glob("*.txt")}
        lonely = sorted(labels - stems - {place / "classes.txt"})
        problems += [Problem(str(file), f"there is no image of that name in {place}") for file in lonely]
        return found
    if not place.is_file():
        raise DataError(f"there is no file or folder {place}")
    listed = [(i, place.parent / line.strip()) for i, line in enumerate(_lines(place), start=1) if line.strip()]
    problems += [Problem(f"{place}:{i}", f"there is no image {file}") for i, file in listed if not file.is_file()]
    return [file for _, file in listed if file.is_file()]


def _label_of(image: Path) -> Path:
    """Where its boxes stand: the last folder "images" of its path read as "labels", else beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _yolo_box(line: str, names: Sequence[str] | None) -> Box:
    words = line.split()
    is_outline = len(words) >= 7 and len(words) % 2 == 1
    if len(words) != 5 and not is_outline:
        raise DataError(
            f"it has {len(words)} columns; a box has 5: class cx cy width height; a polygon 7, 9, 11 ...: "
            "class x1 y1 x2 y2 x3 y3 ..."
        )
    try:
        index, *numbers = (float(word) for word in words)
    except ValueError:
        raise DataError(f'"{line.strip()}" is not {len(words) if is_outline else "five"} numbers') from None
    if index != index // 1 or index < 0 or (names is not None and index >= len(names)):
        known = f"0 to {len(names) - 1}" if names is not None else "whole numbers from 0"
        raise DataError(f"class {words[0]} is out of range; there are {known}")
    name = names[int(index)] if names is not None else str(int(index))
    return (
        _outline(name, numbers) if is_outline else _checked(Box(name, numbers[0], numbers[1], numbers[2], numbers[3]))
    )


def _outline(name: str, numbers: Sequence[float]) -> Box:
    """The box round a polygon x1, y1, x2, y2 ...   Raises DataError."""
    if not all(map(math.isfinite, numbers)):
        raise DataError("the polygon has a corner that is no number")
    xs, ys = numbers[::2], numbers[1::2]
    cx, cy = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return _checked(Box(name, cx, cy, max(xs) - min(xs), max(ys) - min(ys), is_outline=True))


def _checked(box: Box) -> Box:
    """The box, cut at the image's edges.  Raises DataError if it lies outside by more than rounding."""
    _, cx, cy, width, height, _ = box
    if not (width > 0 and height > 0):
        raise DataError(f"the box is {width:g} wide and {height:g} high; both are to be above 0")
    x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    if not (min(x1, y1) >= -_SLACK and max(x2, y2) <= 1 + _SLACK):
        raise DataError(f"the box reaches from {x1:.3g}, {y1:.3g} to {x2:.3g}, {y2:.3g}, outside of [0, 1]")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)
    return box._replace(cx=(x1 + x2) / 2, cy=(y1 + y2) / 2, width=x2 - x1, height=y2 - y1)


# -- COCO -----------------------------------------------------------------------------------------------------------
def _read_coco(parts: Mapping[str, Sequence[Path]]) -> Result:
    tables: dict[str, Table] = {}
    problems: list[Problem] = []
    for part, files in parts.items():
        rows: list[Row] = []
        for file in files:
            some, bad = _coco_file(file)
            rows, problems = rows + some, problems + bad
        tables[part] = _table(rows)
    return tables, problems


def _coco_file(file: Path) -> tuple[list[Row], list[Problem]]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        images = {entry["id"]: entry for entry in said["images"]}
        names = {entry["id"]: str(entry["name"]) for entry in said.get("categories", [])}
        annotations = list(said.get("annotations", []))
        paths = {key: str(entry["file_name"]) for key, entry in images.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no JSON of COCO with images, annotations and categories: {type(error).__name__}: {error}"
        ) from error
    find, problems, bad = _finder(file), list[Problem](), set[Any]()
    boxes: dict[Any, list[Box]] = {key: [] for key in images}
    found = {key: find(path) for key, path in paths.items()}
    for key in [key for key, path in found.items() if path is None]:
        problems.append(Problem(f"{file} image {key}", f"there is no file {paths[key]}, beside it or in images/"))
        bad.add(key)
    sizes: dict[Any, tuple[float, float]] = {}
    for number, entry in enumerate(annotations):
        where = f"{file} annotation {entry.get('id', number) if isinstance(entry, dict) else number}"
        try:
            key = entry["image_id"]
            if key not in images:
                raise DataError(f"there is no image {key}")
            if key in bad and found[key] is None:
                continue
            if key not in sizes:
                sizes[key] = _size(images[key], str(found[key]))
            if not entry.get("iscrowd"):
                boxes[key].append(_coco_box(entry, names, *sizes[key]))
        except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(
                Problem(where, str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}")
            )
            bad.add(entry.get("image_id") if isinstance(entry, dict) else None)
    beside = {
        key: {str(k): v for k, v in entry.items() if k not in _OF_ONE_IMAGE and isinstance(v, str | int | float)}
        for key, entry in images.items()
    }
    return [(str(found[key]), boxes[key], beside[key]) for key in images if key not in bad], problems


def _coco_box(entry: Mapping[str, Any], names: Mapping[Any, str], width: float, height: float) -> Box:
    if entry["category_id"] not in names:
        raise DataError(f"class {entry['category_id']} is out of range; there are {', '.join(map(str, names))}")
    if len(entry["bbox"]) != 4:
        raise DataError(f"bbox has {len(entry['bbox'])} numbers; it has 4: x y width height")
    x, y, w, h = map(float, entry["bbox"])
    return _checked(Box(names[entry["category_id"]], (x + w / 2) / width, (y + h / 2) / height, w / width, h / height))


def _size(entry: Mapping[str, Any], path: str) -> tuple[float, float]:
    """Width and height of an image, from the JSON or from the image.  Raises DataError where its boxes lie on an image
    that was not turned upright.
    """
    height, width = image_size(path)
    if not (entry.get("width") and entry.get("height")):
        return width, height
    said = float(entry["width"]), float(entry["height"])
    if said == (height, width) != (width, height):
        raise DataError(
            f"{path} is said to be {said[0]:g} x {said[1]:g}, but is {width} x {height} once it is upright, as EXIF "
            "says: were its boxes drawn on it lying? Turn the image and drop its EXIF, or draw them again"
        )
    return said


def _finder(file: Path) -> "Callable[[str], Path | None]":
    """Where an image of this JSON is: beside it, in images/, in the folder of its part; from the folder above too."""
    part = file.stem.rpartition("_")[2]
    roots = [root / sub for root in (file.parent, file.parent.parent) for sub in ("", "images", part, f"images/{part}")]

    def find(name: str) -> Path | None:
        return next((root / name for root in roots if (root / name).is_file()), None)

    return find


def _table(rows: Sequence[Row]) -> Table:
    images = [Path(image) for image, *_ in rows]
    columns: dict[str, Sequence[Any]] = {
        IMAGE: [image for image, *_ in rows],
        BOXES: [boxes for _, boxes, _ in rows],
        FOLDER: [str(image.parent) for image in images],
        VIDEO: [_FRAME.sub("", image.stem) for image in images],
    }
    names = dict.fromkeys(name for *_, beside in rows for name in beside)
    columns |= {name: [beside.get(name) for *_, beside in rows] for name in names}
    return Table(columns, list(columns[IMAGE]))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
