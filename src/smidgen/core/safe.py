"""Read files that a stranger made: tensors from safetensors, settings from JSON.

Everything is checked against the size of the file before memory is taken for it, and what is wrong is a FolderError of
one line. A safetensors file is

    8 bytes: length of the header, little-endian | header: JSON | data: the tensors' bytes, without gaps

    header: {"__metadata__": {str: str}, name: {"dtype": "F32", "shape": [3, 5], "data_offsets": [begin, end]}, ...}

Format: https://github.com/huggingface/safetensors. We parse the header ourselves, because that library takes duplicate
keys, and copy every tensor into memory of our own, because its tensors keep the file mapped.
"""

import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Never

import torch
from torch import Tensor

from .errors import FolderError, require

try:
    from zlib_ng.zlib_ng import crc32  # the same number in a fifth of the time
except ImportError:  # a machine for which there is no wheel
    from zlib import crc32

# In the order in which the safetensors library lays tensors out: last first, so that each is aligned.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DEPTH = 32  # of nested JSON
MAX_DIMENSIONS = 8  # of a tensor
_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Entry(NamedTuple):
    """One tensor in a file: `begin` and `end` count bytes from the first byte of data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says it holds, checked against the size of the file."""

    tensors: dict[str, Entry]  # in the order of the data
    metadata: dict[str, str]
    data_begin: int  # bytes from the start of the file
    size_bytes: int  # of the file


def read_header(path: str | Path, *, max_header_bytes: int = 16 << 20, max_tensors: int = 1 << 16) -> Header:
    """Read and check the header of a safetensors file, and nothing else of it. Raises FolderError."""
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        _require(len(start) == 8, path, f"is {size} bytes; a safetensors file has at least 8")
        length = int.from_bytes(start, "little")
        # Only where it cannot be a length: one header in 32 has a length whose first byte is that of a pickle.
        pickled = length > size - 8 and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")
        _require(not pickled, path, f"is a pickle. {_CONVERT}")
        _require(length <= size - 8, path, f"says its header is {length} bytes, but is itself {size} bytes long")
        _require(
            length <= max_header_bytes, path, f"has a header of {length} bytes; at most {max_header_bytes} are read"
        )
        text = file.read(length)
    _require(
        # Before parsing: what JSON makes of 16 MB of brackets is much larger than they are.
        text.count(b"{") <= max_tensors + 2
        and text.count(b"[") <= 2 * max_tensors
        and text.count(b",") <= (MAX_DIMENSIONS + 4) * max_tensors,
        path,
        f"has a header of more than {max_tensors} tensors",
    )
    header = _parse(text, path)
    metadata = header.pop("__metadata__", {})
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _require(plain, path, "has metadata that are not texts")
    entries = sorted(
        ((name, _entry(name, value, path)) for name, value in header.items()), key=lambda item: item[1][2:]
    )
    end = 0
    for name, entry in entries:
        _require(entry.begin == end, path, f"has a gap or an overlap of data before tensor {_short(name)}")
        end = entry.end
    _require(end == size - 8 - length, path, f"has {size - 8 - length} bytes of data, its header describes {end}")
    return Header(tensors=dict(entries), metadata=metadata, data_begin=8 + length, size_bytes=size)


def read_tensors(
    path: str | Path,
    header: Header | None = None,
    names: Iterable[str] | None = None,
    look: Callable[[str, Tensor], None] = lambda name, tensor: None,
) -> dict[str, Tensor]:
    """Read tensors from a safetensors file, all or `names`, into fresh CPU memory, each a storage of its own.

    header: what `read_header` returned for this file, if it was called.   Raises FolderError.
    look: called with each tensor as soon as it is read, while the processor's cache has it.
    """
    path = Path(path)
    header = header or read_header(path)
    wanted = header.tensors.keys() if names is None else list(names)
    missing = [_short(name) for name in wanted if name not in header.tensors]
    _require(not missing, path, f"has no tensor {', '.join(missing)}")
    sizes = {name: header.tensors[name].end - header.tensors[name].begin for name in wanted}
    begins = itertools.accumulate(map(_whole_lines, sizes.values()), initial=0)
    tensors = {}
    try:
        memory = _fresh(sum(map(_whole_lines, sizes.values())))
    except (OSError, RuntimeError) as error:
        raise FolderError(f"{path}: holds {sum(sizes.values())} bytes, more than there is memory for") from error
    with _open(path) as file:
        _require(os.fstat(file.fileno()).st_size == header.size_bytes, path, "changed while it was read")
        for (name, size), begin in zip(sizes.items(), begins, strict=False):
            entry = header.tensors[name]
            file.seek(header.data_begin + entry.begin)
            _require(file.readinto(memory[begin : begin + size]) == size, path, "changed while it was read")
            dtype = DTYPES[entry.dtype]
            tensor = (
                torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize, offset=begin)
                if size
                else torch.empty(0, dtype=dtype)
            )
            if dtype is torch.bool:
                _require(bool((tensor.view(torch.uint8) <= 1).all()), path, f"{_short(name)} is not all true or false")
            tensors[name] = tensor.view(entry.shape)
            look(name, tensors[name])
    return tensors


def read_into(memory: Tensor, path: str | Path, header: Header, name: str) -> Tensor:
    """Read one tensor of numbers into the first bytes of `memory` (uint8); a view of these.  Raises FolderError."""
    path, entry = Path(path), header.tensors[name]
    tensor = memory[: entry.end - entry.begin].view(DTYPES[entry.dtype]).view(entry.shape)
    with _open(path) as file:
        file.seek(header.data_begin + entry.begin)
        read = file.readinto(_memory(tensor))
        _require(read == entry.end - entry.begin, path, "changed while it was read")
    return tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; the same tensors give the same bytes. Without metadata {"format": "pt"}, as HF writes.

    Not atomic by itself: write into `files.atomic_directory`.
    """
    order = list(NAMES)
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    require(not unknown, f"{path}: no dtype for {', '.join(unknown)}; there are {', '.join(DTYPES)}", FolderError)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_memory(_plain(tensors[name])))


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's dtype, shape and little-endian bytes: "crc32:0123abcd".  Strides and device do not count."""
    plain = _plain(tensor)
    return f"crc32:{crc32(_memory(plain), crc32(_described(plain))):08x}"


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of the same, in hexadecimal: what stood in folders of format 1."""
    plain = _plain(tensor)
    digest = hashlib.sha256(_described(plain))
    digest.update(_memory(plain))
    return digest.hexdigest()


def is_intact(tensor: Tensor, said: Any) -> bool:
    """True if a tensor has the checksum that a folder says, of either kind."""
    return bool(said == (checksum if str(said).startswith("crc32:") else tensor_sha256)(tensor))


def read_json(path: str | Path, *, max_bytes: int = 4 << 20) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, NaN, more than `max_bytes` and deep nesting are refused with FolderError."""
    path = Path(path)
    with _open(path) as file:
        text = file.read(max_bytes + 1)
    _require(len(text) <= max_bytes, path, f"is larger than {max_bytes} bytes, the most that is read")
    value = _parse(text, path)
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    _require(not level, path, f"is nested deeper than {MAX_DEPTH}")
    return value


_CONVERT = (
    "Loading a pickle can run code that it brings, so we do not. "
    "Where you trust it, load it yourself and write it again with safetensors.torch.save_file"
)


def _require(condition: bool, path: Path, reason: str) -> None:
    if not condition:
        raise FolderError(f"{path}: {reason}")


def _short(name: str) -> str:
    """A stranger's name, fit to print on one line."""
    return ascii(name) if len(name) <= 120 else f"{name[:100]!a}... ({len(name)} characters)"


def _open(path: Path) -> io.BufferedReader:
    _require(path.suffix not in PICKLES, path, f"is a pickle. {_CONVERT}")
    return open_regular(path)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file that lies in its folder (a hub cache's link into its own `blobs` counts as there)."""
    try:
        folder, real = path.parent.resolve(strict=True), path.resolve(strict=True)
        blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
        _require(
            real.is_relative_to(folder) or real.parent in blobs,
            path,
            "is a link that leaves its folder; copy the file itself there",
        )
        _require(stat.S_ISREG(real.stat().st_mode), path, "is not a regular file")
        return open(real, "rb")
    except FileNotFoundError as error:
        near = [path.with_suffix(suffix) for suffix in PICKLES if path.with_suffix(suffix).exists()]
        hint = f", but {near[0].name}, a pickle. {_CONVERT}" if near and path.suffix == ".safetensors" else ""
        raise FolderError(f"{path.parent} has no {path.name}{hint}") from error
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a loop of links, a name with a zero byte
        raise FolderError(f"{path}: cannot be read: {error}") from error


def _entry(name: str, value: Any, path: Path) -> Entry:
    """Check one tensor of a header."""
    if wrong := _wrong_with(value):
        raise FolderError(f"{path}: tensor {_short(name)} {wrong}")
    return Entry(value["dtype"], tuple(value["shape"]), *value["data_offsets"])


def _wrong_with(value: Any) -> str | None:
    """What makes it no entry of a header, or None."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return "does not have dtype, shape and data_offsets, and these only"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"is not of a dtype we read: {', '.join(DTYPES)}"
    # An empty tensor may have any other dimensions; torch multiplies them all the same.
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= 1 << 59:
        return "has a shape that cannot be"
    if not _counts(offsets) or len(offsets) != 2:
        return "has data_offsets that cannot be"
    size, held = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    return None if held == size else f"needs {size} bytes for its shape, its data_offsets hold {held}"


def _counts(value: Any) -> bool:
    """A list of whole numbers from 0 to the largest file there can be."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    """JSON as its standard has it, and an object. Raises FolderError."""
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
        if b"\\u" in text:  # half a surrogate pair cannot be printed or written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise FolderError(f"{path}: is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:  # json's own, ours from below, and UnicodeError
        raise FolderError(f"{path}: is not valid JSON: {str(error)[:300]}") from error
    _require(isinstance(value, dict), path, f"holds a JSON {type(value).__name__}, not an object")
    return value  # type: ignore[no-any-return]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{_short(max(names, key=lambda name: names[name]))} stands there more than once")
    return value


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _described(tensor: Tensor) -> bytes:
    return f"{NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode()


def _whole_lines(size: int) -> int:
    """A size in bytes as whole cache lines, so that every tensor begins at one."""
    return -(-size // 64) * 64


def _fresh(size: int) -> memoryview:
    """Memory that nobody else has.

    On Linux it is asked for all at once: a fault for each page, as it is first written, takes longer.  Not in large
    pages: a virtual machine that gives free ones back to its host waits for each of them, ten times as long.
    """
    if sys.platform != "linux":
        return _memory(torch.empty(size, dtype=torch.uint8))
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without it: pages come one by one
        memory.madvise(_POPULATE_WRITE)
    return memoryview(memory)


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU and in one piece: itself where it is so already."""
    return tensor.detach().cpu().contiguous()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    if not tensor.nbytes:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # lives as long as the view of its memory
    return memoryview(memory).cast("B")
