"""Images as data holds them: a path, or the bytes of a file in a column; judged by their headers, and made tensors.

    "photos/cat/17.jpg"                              as image folders and CSV files have it
    {"bytes": b"...", "path": "17.png"}              as Parquet files and data sets of the Hugging Face hub have it
    b"..."                                           the bytes alone

Turned upright as EXIF says, alpha laid on white, palettes and grey levels made RGB (or grey, where the model sees one
channel).  Pillow does the decoding.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from smidgen.core.errors import DataError, MissingDependency

if TYPE_CHECKING:
    from PIL.Image import Image

S = TypeVar("S")
T = TypeVar("T")

# of files that are taken for images; what Pillow cannot open of them is named, and not passed over
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".tga"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"}
)
_ENDS = 1 << 12  # bytes of a file's start and end by which two files are told apart
_THREADS = 8
_TOGETHER = 64  # values that wait for a thread: they may be whole files
_NAMED = 10  # broken images named in an error
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> Pillow's number of what turns it upright
_SIDEWAYS = (5, 6, 7, 8)  # orientations in which height and width change places


class Fitting(Protocol):
    """How any image becomes bytes of one shape; two that print alike do the same."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    def put(self, image: Any, pixels: Tensor) -> None:
        """Decode an image into `pixels`, bytes of that shape.  Raises DataError."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How any image becomes one of `height` x `width` pixels.

    shortest: the short side becomes this long, and the middle is cut out; None squashes the image into shape.
    channels: 3 for RGB, 1 for grey levels.   resample: Pillow's number of the filter; 2 is bilinear, 3 bicubic.
    """

    height: int
    width: int
    shortest: int | None = None
    channels: int = 3
    resample: int = 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def put(self, image: Any, pixels: Tensor) -> None:
        pixels.copy_(decode(image, self))


def is_image(value: Any) -> bool:
    """True for what a column of images holds."""
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    return isinstance(value, bytes) or (isinstance(value, str) and Path(value).suffix.lower() in SUFFIXES)


def image_name(value: Any) -> str:
    """What to call an image in a message or a report."""
    if isinstance(value, dict):
        return str(value.get("path") or f"an image of {len(value.get('bytes') or b'')} bytes")
    return f"an image of {len(value)} bytes" if isinstance(value, bytes) else str(value)


def image_problem(value: Any) -> str | None:
    """None if the image's header can be read, else what is wrong.  The pixels are not decoded."""
    try:
        with _opened(value) as image:
            return None if min(image.size) > 0 else "it has no pixels"
    except DataError as error:
        return str(error)


def image_problems(values: Sequence[Any]) -> dict[int, str]:
    """Which of many images cannot be read: number -> what is wrong."""
    return {i: what for i, what in enumerate(in_threads(image_problem, values)) if what is not None}


def image_size(value: Any) -> tuple[int, int]:
    """Height and width of an image as it is seen, turned upright; from its header.  Raises DataError."""
    with _opened(value) as image:
        return (image.width, image.height) if _orientation(image) in _SIDEWAYS else (image.height, image.width)


def decode(value: Any, fit: Fit) -> Tensor:
    """The image as uint8 (C, H, W).  Raises DataError."""
    with _opened(value) as image:
        try:
            least = (2 * (fit.shortest or fit.width), 2 * (fit.shortest or fit.height))
            image.draft("RGB", least[::-1] if _orientation(image) in _SIDEWAYS else least)  # JPEGs: a smaller
            small = _fitted(_plain(image, fit.channels), fit)
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they meet in a damaged file
            raise DataError(f"it cannot be decoded: {' '.join(str(error).split())}") from None
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(fit.height, fit.width, fit.channels).permute(2, 0, 1).contiguous()


def decode_all(values: Sequence[Any], fitting: Fitting, names: Sequence[str]) -> Tensor:
    """All images as uint8 (N, C, H, W).   names: of the rows, for the error.   Raises DataError naming the broken."""
    pixels = torch.empty(len(values), *fitting.shape, dtype=torch.uint8)

    def put(numbered: tuple[int, Any]) -> tuple[int, str] | None:
        i, value = numbered
        try:
            fitting.put(value, pixels[i])
        except DataError as error:
            return i, str(error)
        return None

    if found := list(filter(None, in_threads(put, enumerate(values)))):
        broken = [f"{names[i]}: {what}" for i, what in found]
        rest = f"\n  and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise DataError(
            f"{len(broken)} of {len(values)} images are damaged. Mend or remove them:\n  "
            + "\n  ".join(broken[:_NAMED])
            + rest
        )
    return pixels


def content_key(value: Any) -> str:
    """The same for equal images: by the bytes, of large files by the size and both ends."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    with open(_path(value), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = file.read(_ENDS)
        if size > len(ends):
            file.seek(max(len(ends), size - _ENDS))
            ends += file.read()
    return f"{size}:{hashlib.blake2b(ends, digest_size=16).hexdigest()}"


def in_threads(function: Callable[[S], T], values: Iterable[S]) -> list[T]:
    """The function of each value, in order; Pillow and the disk let other threads run.

    A few values are there at a time: lazy ones are read by this thread, as the others come to need them.
    """
    found, rest = list[T](), iter(values)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        while some := list(islice(rest, _TOGETHER)):
            found += pool.map(function, some)
    return found


@contextmanager
def _opened(value: Any) -> "Iterator[Image]":
    """The image with its header read.  Raises DataError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency('Pillow is needed to read images: pip install "smidgen[vision]"') from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) and not _path(value):
        raise DataError("there is no image")
    try:
        image = Image.open(BytesIO(data) if isinstance(data, bytes) else _path(value))
    except FileNotFoundError:
        raise DataError(f"there is no file {_path(value)}") from None
    except Exception as error:  # UnidentifiedImageError, OSError, DecompressionBombError, SyntaxError of a chunk ...
        is_empty = not data if isinstance(data, bytes) else not Path(_path(value)).stat().st_size
        what = "0 bytes" if is_empty else type(error).__name__
        raise DataError(f"{image_name(value)} is no image that can be read ({what})") from None
    with image:
        yield image


def _path(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) else ""


def _orientation(image: "Image") -> int:
    """EXIF's number of how the image lies; 1 is upright.  That of a PNG is looked for in front of its pixels only,
    where it is usual: all would have to be decoded to know that nothing stands behind them.
    """
    try:
        return 1 if image.format == "PNG" and "exif" not in image.info else int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF: Pillow raises whatever it meets, and viewers show such an image as it is
        return 1


def _plain(image: "Image", channels: int) -> "Image":
    """Upright, RGB or grey, without alpha."""
    from PIL import Image

    turn = _TURNS.get(_orientation(image))
    image.load()
    upright: Image.Image = image if turn is None else image.transpose(Image.Transpose(turn))
    mode = "RGB" if channels == 3 else "L"
    if upright.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion cuts off all above 255
        upright = upright.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    if upright.mode == "F":
        raise DataError("its pixels are floating-point numbers whose range nobody says; save it with 8 or 16 bits")
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert(mode)


def _fitted(image: "Image", fit: Fit) -> "Image":
    from PIL.Image import Resampling

    resample = Resampling(fit.resample)
    if fit.shortest is None:
        return image if image.size == (fit.width, fit.height) else image.resize((fit.width, fit.height), resample)
    scale = fit.shortest / min(image.size)
    # of the original, the part whose middle is cut out after resizing; beyond the edges there is black
    width, height = fit.width / scale, fit.height / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    if left < 0 or top < 0:
        whole = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
        x, y = (whole.width - fit.width) // 2, (whole.height - fit.height) // 2
        return whole.crop((x, y, x + fit.width, y + fit.height))
    return image.resize((fit.width, fit.height), resample, box=(left, top, left + width, top + height))
