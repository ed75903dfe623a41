"""Read the tensors of a file that torch.save wrote, without unpickling it.

Such a file is a zip archive:

    <name>/data.pkl      a program for Python's pickle machine that makes {"key": tensor, ...}
    <name>/data/<n>      the bytes of each storage

A pickle can name anything that Python can import, and have it called.  Here nothing is imported or called: the standard
library takes the program apart into its instructions, and those that make plain mappings of tensors are followed, on
texts, numbers and tuples alone.  Any other is refused, so a file is either such a mapping or not read.

Where a whole model was pickled, `read_recorded` follows its program too: what it would make of a class or a function is
written down as a `Record`, and the caller picks its tensors from there.
"""

import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..core.errors import FolderError
from ..core.safe import MAX_DIMENSIONS, open_regular

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
_MAX_PROGRAM = 16 << 20  # bytes of data.pkl
T = TypeVar("T")


class _Name(str):
    """What the program would import: a word here, never looked up."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    member: str
    length: int


class Described(NamedTuple):
    """A tensor before its bytes are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Record:
    """What a program would make by calling `name`, a class or a function, written "module name", and was not called.

    arguments: of the call.   attributes: what the object would be given afterwards.
    """

    name: str
    arguments: Any
    attributes: dict[str, Any] = field(default_factory=dict)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by key, on the CPU.  Raises FolderError for anything that is not just that."""
    with _opened(path) as archive:
        return archive.tensors(_Machine(path).run(archive.program))


def read_recorded(path: Path, choose: Callable[[Any], tuple[Any, T]]) -> tuple[dict[str, Tensor], T]:
    """Tensors of a file that holds objects, on the CPU.  Raises FolderError.

    choose: given what the file holds, as plain values, `Described` tensors and `Record`s, that may hold each other;
    returns the `Described` ones to read, by key, and whatever else it found.
    """
    with _opened(path) as archive:
        chosen, found = choose(_Recorder(path).run(archive.program))
        return archive.tensors(chosen), found


@contextmanager
def _opened(path: Path) -> Iterator["_Archive"]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield _Archive(archive, path)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, ValueError, EOFError, OSError) as error:
        raise FolderError(
            f"{path}: is no zip archive that torch.save wrote ({str(error)[:100]}). Load it where you trust it, and "
            "write it again with safetensors.torch.save_file"
        ) from error


class _Archive:
    """An archive of torch.save's: its program, and the tensors that were described by it."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        self.members = {info.filename: info for info in archive.infolist()}
        programs = [name for name in self.members if name.rpartition("/")[2] == "data.pkl"]
        _require(len(programs) == 1, path, "is no archive of torch.save's, with one data.pkl")
        _require(self.members[programs[0]].file_size <= _MAX_PROGRAM, path, "has a data.pkl that is too large")
        size = sum(info.file_size for info in self.members.values())
        _require(size <= path.stat().st_size, path, "is compressed; torch.save writes its archives plain")
        self.root = programs[0].removesuffix("data.pkl")
        order = archive.read(f"{self.root}byteorder") if f"{self.root}byteorder" in self.members else b"little"
        _require(order == sys.byteorder.encode(), path, "has its bytes in another order than this machine")
        self.program = archive.read(programs[0])

    def tensors(self, value: Any) -> dict[str, Tensor]:
        """The tensors of a mapping by key."""
        _require(isinstance(value, dict), self.path, "holds no mapping of tensors")
        for key, described in value.items():
            whole = type(key) is str and isinstance(described, Described)
            _require(whole, self.path, f"holds {str(key)[:80]!a}, which is no tensor")
        folder = f"{self.root}data/"
        return {
            key: _tensor(self.archive, self.members, folder, described, self.path) for key, described in value.items()
        }


def _tensor(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str, described: Described, path: Path
) -> Tensor:
    storage, offset, shape, stride = described
    name = folder + storage.member
    size = storage.length * storage.dtype.itemsize
    _require(name in members and members[name].file_size == size, path, f"has no {size} bytes in {name[:80]!a}")
    if not math.prod(shape):
        return torch.empty(shape, dtype=storage.dtype)
    end = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    _require(end <= storage.length, path, f"has a tensor beyond the end of {name[:80]!a}")
    _require(math.prod(shape) <= storage.length, path, f"has a tensor that repeats {name[:80]!a}")
    flat = torch.frombuffer(bytearray(archive.read(name)), dtype=storage.dtype)
    return flat.as_strided(shape, stride, offset).clone(memory_format=torch.contiguous_format)


class _Machine:
    """Follows the instructions that torch.save writes for a mapping of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the program leaves on its stack."""
        try:
            for instruction, argument, _ in pickletools.genops(program):
                if instruction.name == "STOP":
                    (value,) = self.stack
                    return value
                self._follow(instruction.name, argument)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FolderError(f"{self.path}: holds a damaged pickle: {str(error)[:200]}") from error
        raise FolderError(f"{self.path}: holds a pickle without an end")

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "NEWTRUE" | "NEWFALSE" | "NONE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False, "NONE": None}[name])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Name(argument))
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._popped(int(name[-1]))))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "SETITEM":
                self._fill(self._popped(2))
            case "SETITEMS":
                self._fill(self._marked())
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "REDUCE":
                made, arguments = self._popped(2)
                stack.append(self._made(made, arguments))
            case "BUILD":  # the attributes of a state dict: versions of its modules
                stack.pop()
            case _:
                raise FolderError(f"{self.path}: holds a pickle that does more than name tensors ({name})")

    def _popped(self, count: int) -> list[Any]:
        taken = self.stack[len(self.stack) - count :] if count <= len(self.stack) else []
        del self.stack[len(self.stack) - len(taken) :]
        if len(taken) < count:
            raise IndexError("its stack is empty")
        return taken

    def _marked(self) -> list[Any]:
        return self._popped(len(self.stack) - self.marks.pop())

    def _fill(self, items: list[Any]) -> None:
        self.stack[-1].update(dict(zip(items[::2], items[1::2], strict=True)))

    def _storage(self, word: Any, kind: Any, member: Any, device: Any, count: Any) -> _Storage:
        known = word == "storage" and type(kind) is _Name and kind in _STORAGES
        _require(known and type(member) is str and member.isdigit(), self.path, f"holds {str(kind)[:80]!a}, no storage")
        _require(type(count) is int and count >= 0, self.path, "has a storage of no size")
        return _Storage(_STORAGES[kind], member, count)

    def _made(self, what: Any, arguments: Any) -> Any:
        _require(type(what) is _Name, self.path, "calls what it made itself")
        if what == _ORDERED and arguments == ():
            return {}
        if what == _PARAMETER and isinstance(arguments[0], Described):
            return arguments[0]
        _require(what == _TENSOR, self.path, f"would call {str(what)[:80]!a}; tensors need no such thing")
        storage, offset, shape, stride = arguments[:4]
        numbers = (offset, *shape, *stride)
        sound = type(storage) is _Storage and len(shape) == len(stride) <= MAX_DIMENSIONS
        sound = sound and all(type(n) is int and 0 <= n < 1 << 40 for n in numbers)
        _require(sound, self.path, "describes a tensor that cannot be")
        return Described(storage, offset, shape, stride)


class _Recorder(_Machine):
    """Follows also the instructions that make objects, of which it makes records."""

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "EMPTY_LIST":
                stack.append([])
            case "BINFLOAT":
                stack.append(argument)
            case "APPEND":
                self._lengthen(self._popped(1))
            case "APPENDS":
                self._lengthen(self._marked())
            case "NEWOBJ":
                made, arguments = self._popped(2)
                stack.append(self._made(made, arguments))
            case "BUILD":
                (state,) = self._popped(1)
                if isinstance(stack[-1], Record) and isinstance(state, dict):
                    stack[-1].attributes.update(state)
            case _:
                super()._follow(name, argument)

    def _lengthen(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Record):
            self.stack[-1].extend(items)

    def _fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], Record):
            super()._fill(items)

    def _made(self, what: Any, arguments: Any) -> Any:
        plain = (what == _ORDERED and arguments == ()) or what in (_TENSOR, _PARAMETER)
        return super()._made(what, arguments) if plain or type(what) is not _Name else Record(what, arguments)


def _require(condition: bool, path: Path, reason: str) -> None:
    if not condition:
        raise FolderError(f"{path}: {reason}")
