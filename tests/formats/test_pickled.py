"""Files of torch.save are read without unpickling them, and whatever is more than tensors is refused."""

import collections
import contextlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen.core.errors import FolderError
from smidgen.formats.pickled import read_pickled

ROWS = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": ROWS, "b.c": torch.arange(3)},
        lambda: {"a": ROWS.T, "row": ROWS[1], "column": ROWS[:, 1], "same": ROWS},  # one storage
        lambda: {"half": ROWS.half(), "bf16": ROWS.bfloat16(), "double": ROWS.double(), "bool": ROWS > 3},
        lambda: {"empty": torch.empty(0, 3), "number": torch.tensor(3.0)},
        lambda: collections.OrderedDict(a=ROWS),
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(),
        lambda: {"parameter": nn.Parameter(ROWS), "frozen": nn.Parameter(ROWS, requires_grad=False)},
        dict,
    ],
)
def test_it_reads_what_torch_reads(tmp_path: Path, make: Callable[[], dict[str, Tensor]], protocol: int) -> None:
    path, state = tmp_path / "x.bin", make()
    torch.save(state, path, pickle_protocol=protocol)
    read = read_pickled(path)
    assert list(read) == list(state)
    for key, tensor in read.items():
        assert torch.equal(tensor, state[key])
        assert tensor.dtype == state[key].dtype
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


class Runs:
    """What a bad pickle does when it is loaded."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = (what, arguments)

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
        for name, content in members.items():
            file.writestr(f"x/data/{name.lstrip('_')}", content)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["alone", "as a value", "as a key", "inside a tensor"])
def test_nothing_is_ever_called(tmp_path: Path, protocol: int, where: str) -> None:
    made = tmp_path / "made"
    call = Runs(os.mkdir, str(made))
    value: Any = {"alone": call, "as a value": {"a": call}, "as a key": {"a": 1}, "inside a tensor": {"a": [call]}}[
        where
    ]
    path = archive(tmp_path / "x.bin", pickle.dumps(value, protocol))
    with pytest.raises(FolderError, match=r"x\.bin: (holds|would call|calls)"):
        read_pickled(path)
    assert not made.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (pickle.dumps({"a": 1}, 2), "holds 'a', which is no tensor"),
        (pickle.dumps([1], 2), "does more than name tensors"),
        (pickle.dumps({"a": {"b": 1}}, 2), "holds 'a', which is no tensor"),
        (b"\x80\x02}q\x00", "without an end|damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"nonsense", "damaged|more than"),
        (b"", "damaged|without an end"),
    ],
)
def test_a_damaged_or_foreign_program_is_refused(tmp_path: Path, program: bytes, message: str) -> None:
    with pytest.raises(FolderError, match=message):
        read_pickled(archive(tmp_path / "x.bin", program))


def _described(storage: tuple[Any, ...], *arguments: Any) -> bytes:
    """The program for one tensor, as torch writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return storage if value == "in its place" else None

    buffer = io.BytesIO()
    call = Runs(torch._utils._rebuild_tensor_v2, "in its place", *arguments, False, collections.OrderedDict())
    Pickler(buffer, 2).dump({"a": call})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("storage", "arguments", "message"),
    [
        (("storage", torch.FloatStorage, "0", "cpu", 3), (0, (3,), (1,)), None),
        (("storage", torch.FloatStorage, "0", "cpu", 4), (0, (3,), (1,)), "has no 16 bytes"),
        (("storage", torch.FloatStorage, "0", "cpu", 3), (1, (3,), (1,)), "beyond the end"),
        (("storage", torch.FloatStorage, "0", "cpu", 3), (0, (1 << 30,), (0,)), "repeats"),
        (("storage", torch.FloatStorage, "0", "cpu", 3), (0, (3,), (-1,)), "cannot be"),
        (("storage", torch.FloatStorage, "0", "cpu", 3), (0, (3,), (1, 1)), "cannot be"),
        (("storage", torch.FloatStorage, "../0", "cpu", 3), (0, (3,), (1,)), "no storage"),
        (("storage", torch.Tensor, "0", "cpu", 3), (0, (3,), (1,)), "no storage"),
    ],
)
def test_a_tensor_lies_within_its_storage(tmp_path: Path, storage: Any, arguments: Any, message: str | None) -> None:
    path = archive(tmp_path / "x.bin", _described(storage, *arguments), _0=ROWS[0, :3].numpy().tobytes())
    if message is None:
        assert torch.equal(read_pickled(path)["a"], ROWS[0, :3])
        return
    with pytest.raises(FolderError, match=message):
        read_pickled(path)


def test_what_is_no_archive_of_torchs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FolderError, match=r"no zip archive that torch.save wrote.*safetensors"):
        read_pickled(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/version", b"3")
    with pytest.raises(FolderError, match=r"with one data\.pkl"):
        read_pickled(path)
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        file.writestr("x/data/0", bytes(1 << 20))
    with pytest.raises(FolderError, match="is compressed"):
        read_pickled(path)
    with pytest.raises(FolderError, match=r"has no gone\.bin"):
        read_pickled(tmp_path / "gone.bin")


def test_a_file_with_some_bytes_changed_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path, generator = tmp_path / "x.bin", random.Random(0)
    torch.save(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        program = file.read("x/data.pkl")
        data = {f"_{n}": file.read(f"x/data/{n}") for n in range(7)}
    for number in range(600):
        changed = bytearray(program if number % 2 else whole)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        if number % 2:
            archive(path, bytes(changed), **data)
        else:
            path.write_bytes(changed)
        with contextlib.suppress(FolderError):
            assert all(isinstance(tensor, Tensor) for tensor in read_pickled(path).values())
