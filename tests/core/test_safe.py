"""Hostile files are refused in one line, quickly, before memory is taken for them; good ones come back bit for bit."""

import contextlib
import hashlib
import json
import os
import pickle
import time
import tracemalloc
import zlib

import hypothesis
import pytest
import safetensors.torch
import torch
from hypothesis import strategies

from smidgen.core import safe
from smidgen.core.errors import FolderError


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(5, 3, dtype=torch.bfloat16),
        "half": torch.randn(7).half(),
        "double": torch.randn(2, 3).double(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([-1, 2**40]),
        "flag": torch.tensor([True, False, True]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "é": torch.randn(4, 6).T,
    }


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(shape, begin, end, dtype="F32", **more) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}}


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    safe.write_tensors(tmp_path / "x.safetensors", tensors)
    read = safe.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_files_are_byte_for_byte_those_of_the_safetensors_library(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    safe.write_tensors(tmp_path / "ours", dict(reversed(tensors.items())))
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert safe.read_header(tmp_path / "ours").metadata == {"format": "pt"}


def test_tensors_read_are_private_writable_and_separate(tmp_path):
    path = tmp_path / "x.safetensors"
    safe.write_tensors(path, some_tensors())
    before = path.read_bytes()
    read = safe.read_tensors(path)
    for tensor in read.values():
        tensor.zero_()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert path.read_bytes() == before
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()


def test_some_tensors_can_be_read_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = some_tensors()
    safe.write_tensors(path, tensors)
    header = safe.read_header(path)
    read = safe.read_tensors(path, header, ["flag", "b.weight"])
    assert list(read) == ["flag", "b.weight"]
    assert torch.equal(read["b.weight"], tensors["b.weight"])
    with pytest.raises(FolderError, match="has no tensor 'c', 'd'"):
        safe.read_tensors(path, header, ["c", "flag", "d"])


def test_every_tensor_read_begins_at_a_cache_line(tmp_path):
    safe.write_tensors(tmp_path / "x.safetensors", some_tensors())
    read = safe.read_tensors(tmp_path / "x.safetensors")
    assert {tensor.data_ptr() % 64 for tensor in read.values() if tensor.numel()} == {0}


def test_a_file_for_which_there_is_no_memory_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    safe.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3, 5)})

    def full(*arguments: object, **more: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(safe, "_fresh", full)
    with pytest.raises(FolderError, match="holds 60 bytes, more than there is memory for"):
        safe.read_tensors(tmp_path / "x.safetensors")


def test_the_checksum_is_over_dtype_shape_and_bytes():
    tensor = torch.tensor([[1.0, 2.0, 3.0]])
    assert safe.checksum(tensor) == f"crc32:{zlib.crc32(b'F32 [1, 3]' + bytes([10]) + tensor.numpy().tobytes()):08x}"
    assert safe.checksum(tensor) != safe.checksum(tensor.reshape(3, 1))
    assert safe.checksum(tensor) != safe.checksum(tensor.view(torch.int32))
    matrix = torch.randn(3, 5, requires_grad=True)
    assert safe.checksum(matrix) == safe.checksum(matrix.T.contiguous().T)
    assert safe.checksum(torch.empty(0)) != safe.checksum(torch.empty(0, 1))


def test_every_flipped_bit_changes_the_checksum():
    tensor = torch.randn(3, 5)
    said, bits = safe.checksum(tensor), tensor.view(torch.int32).flatten()
    for place in range(15):
        for bit in range(32):
            bits[place] ^= 1 << bit if bit < 31 else -(2**31)
            assert not safe.is_intact(tensor, said)
            bits[place] ^= 1 << bit if bit < 31 else -(2**31)
    assert safe.is_intact(tensor, said)


def test_a_tensor_is_intact_by_either_kind_of_checksum_and_by_no_other():
    tensor = torch.randn(3, 5)
    assert safe.is_intact(tensor, safe.checksum(tensor))
    assert safe.is_intact(tensor, safe.tensor_sha256(tensor))
    for said in (None, 7, "", "crc32:", "crc32:00000000", safe.checksum(tensor)[6:], safe.tensor_sha256(tensor + 1)):
        assert not safe.is_intact(tensor, said)


def test_the_checksum_of_format_1_is_sha256():
    tensor = torch.tensor([[1.0, 2.0, 3.0]])
    assert safe.tensor_sha256(tensor) == hashlib.sha256(b"F32 [1, 3]\n" + tensor.numpy().tobytes()).hexdigest()
    assert safe.tensor_sha256(tensor) != safe.tensor_sha256(tensor.reshape(3, 1))
    assert safe.tensor_sha256(tensor) != safe.tensor_sha256(tensor.view(torch.int32))
    matrix = torch.randn(3, 5, requires_grad=True)
    assert safe.tensor_sha256(matrix) == safe.tensor_sha256(matrix.T.contiguous().T)
    assert safe.tensor_sha256(torch.empty(0)) != safe.tensor_sha256(torch.empty(0, 1))
    assert safe.tensor_sha256(torch.ones(3).bfloat16()) == safe.tensor_sha256(torch.ones(3).bfloat16())


HOSTILE = {
    "nothing": (b"", "at least 8"),
    "length only": ((2).to_bytes(8, "little"), "says its header is 2 bytes, but is itself 8"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "but is itself 10 bytes long"),
    "pickle": (pickle.dumps([1] * 9), "is a pickle"),
    "zip, as torch saves": (b"PK\x03\x04" + bytes(60), "is a pickle"),
    "not JSON": (raw(b"{"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (raw("{}".encode("utf-16")), "not valid JSON"),
    "half a surrogate pair": (raw(b'{"\\ud800": 1}'), "not valid JSON"),
    "an array": (raw([]), "holds a JSON list, not an object"),
    "deep JSON": (raw(b"[" * 100_000), "nested deeper"),
    "deep object": (raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested deeper"),
    "too many brackets": (raw(b"[" + b"[]," * 200_000 + b"[]]"), "more than 65536 tensors"),
    "too many tensors": (
        raw({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(65_537 + 2)}),
        "more than 65536 tensors",
    ),
    "duplicate keys": (
        raw(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "'a' stands there more than once",
    ),
    "duplicate fields": (
        raw(b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "'dtype' stands",
    ),
    "NaN": (raw(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"1"), "NaN is not a JSON number"),
    "infinite number": (raw(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"1"), "too large a number"),
    "number of 100,000 digits": (raw(b'{"a":' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "tensor is a number": (raw({"a": 1}), "does not have dtype, shape and data_offsets"),
    "a field too many": (raw(one([1], 0, 4, more=1), bytes(4)), "and these only"),
    "a field too few": (raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "does not have dtype"),
    "unknown dtype": (raw(one([1], 0, 4, dtype="F4"), bytes(4)), "not of a dtype we read"),
    "dtype is a list": (raw(one([1], 0, 4, dtype=[]), bytes(4)), "not of a dtype we read"),
    "negative dimension": (raw(one([-1], 0, 4), bytes(4)), "shape that cannot be"),
    "two negative dimensions": (raw(one([-1, -1], 0, 4), bytes(4)), "shape that cannot be"),
    "dimension is a float": (raw(one([1.0], 0, 4), bytes(4)), "shape that cannot be"),
    "dimension is true": (raw(one([True], 0, 4), bytes(4)), "shape that cannot be"),
    "dimension is a text": (raw(one(["1"], 0, 4), bytes(4)), "shape that cannot be"),
    "shape is a number": (raw(one(1, 0, 4), bytes(4)), "shape that cannot be"),
    "nine dimensions": (raw(one([1] * 9, 0, 4), bytes(4)), "shape that cannot be"),
    "shape overflows 64 bits": (raw(one([2**32, 2**32], 0, 0)), "shape that cannot be"),
    "empty shape overflows 64 bits": (raw(one([0, 2**62, 2**62], 0, 0)), "shape that cannot be"),
    "dimension overflows 64 bits": (raw(one([0, 2**70], 0, 0)), "shape that cannot be"),
    "rank 50,000,000": (raw(one([50_000_000, 64], 0, 4), bytes(4)), "needs 12800000000 bytes"),
    "offsets too short for the shape": (raw(one([2], 0, 4), bytes(4)), "needs 8 bytes"),
    "offsets reversed": (raw(one([1], 4, 0), bytes(4)), "hold -4"),
    "offsets negative": (raw(one([1], -4, 0), bytes(4)), "data_offsets that cannot be"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)), "data_offsets"),
    "offsets behind the end": (raw(one([1], 4, 8), bytes(4)), "gap or an overlap"),
    "overlapping tensors": (
        raw(one([1], 0, 4) | {"b": one([1], 2, 6)["a"]}, bytes(6)),
        "overlap of data before tensor 'b'",
    ),
    "a gap": (raw(one([1], 0, 4) | {"b": one([1], 8, 12)["a"]}, bytes(12)), "gap"),
    "data left over": (raw(one([1], 0, 4), bytes(5)), "has 5 bytes of data, its header describes 4"),
    "data cut off": (raw(one([1], 0, 4), bytes(3)), "has 3 bytes of data, its header describes 4"),
    "metadata are numbers": (raw({"__metadata__": {"a": 1}}), "metadata that are not texts"),
    "metadata are a list": (raw({"__metadata__": []}), "metadata that are not texts"),
    "true is 2": (raw(one([1], 0, 1, dtype="BOOL"), b"\x02"), "not all true or false"),
    "name of two lines": (raw({"a\nb\x1b[2J": 1}), r"tensor 'a\\nb\\x1b\[2J'"),
    "name of a megabyte": (raw({"a" * 1_000_000: 1}), "1000000 characters"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_one_line(tmp_path, data, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(FolderError, match=reason) as caught:
        safe.read_tensors(path)
    assert time.process_time() - began < 1
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("length", [100 << 20, (16 << 20) + 1])
def test_a_huge_header_is_refused_without_reading_it(tmp_path, length):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # sparse: takes no room
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 8)
    tracemalloc.start()
    with pytest.raises(FolderError, match="at most 16777216 are read"):
        safe.read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_pickles_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FolderError, match=r"is a pickle.*write it again with safetensors"):
        safe.read_tensors(tmp_path / "adapter_model.bin")
    with pytest.raises(FolderError, match=r"has no adapter_model.safetensors, but adapter_model.bin, a pickle"):
        safe.read_tensors(tmp_path / "adapter_model.safetensors")


def test_links_may_not_leave_the_folder(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    safe.write_tensors(tmp_path / "outside", some_tensors())
    safe.write_tensors(adapter / "inside", some_tensors())
    (adapter / "good").symlink_to("inside")
    assert safe.read_tensors(adapter / "good")
    for name, target in {"up": "../outside", "absolute": tmp_path / "outside", "loop": "loop"}.items():
        (adapter / name).symlink_to(target)
        with pytest.raises(FolderError, match=r"leaves its folder|cannot be read"):
            safe.read_tensors(adapter / name)


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    """huggingface_hub keeps a repository as snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123" / "sub"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    safe.write_tensors(blobs / "abcd", some_tensors())
    (snapshot / "x.safetensors").symlink_to("../../../blobs/abcd")
    assert safe.read_tensors(snapshot / "x.safetensors")


def test_what_is_not_a_regular_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FolderError, match="not a regular file"):
            safe.read_json(tmp_path / name)
    with pytest.raises(FolderError, match=r"has no absent\.json"):
        safe.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"r": 8, "r": 9}', "'r' stands there more than once"),
        (b'{"r": NaN}', "NaN is not a JSON number"),
        (b'{"r": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"r": 1e400}', "1e400 is too large a number"),
        (b'"text"', "not an object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
        (b'{"a":' * 10**5, "nested deeper than 32"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "larger than 1000 bytes"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, reason):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(FolderError, match=reason):
        safe.read_json(tmp_path / "x.json", max_bytes=1000 if b"xx" in text else 4 << 20)


def test_good_json_is_read(tmp_path):
    value = {"r": 8, "alpha": 0.5, "é😀": [None, True, {"deep": [[[]]]}], "big": 2**80}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert safe.read_json(tmp_path / "x.json") == value


GOOD = raw(
    {"__metadata__": {"format": "pt"}, **one([2, 3], 0, 24), "b": one([3], 24, 30, "BF16")["a"]}, bytes(range(30))
)
PIECES = strategies.sampled_from(
    [
        b"[",
        b"{",
        b'"',
        b"-1",
        b"NaN",
        b"1e5",
        b"99999999999999999999",
        b'"a"',
        b"null",
        b"\\u",
        b"\\ud800",
        b"\x00",
        b"]}",
    ]
)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    cuts=strategies.lists(
        strategies.tuples(
            strategies.integers(0, len(GOOD)), strategies.integers(0, 4), PIECES | strategies.binary(max_size=3)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_file_is_read_or_refused_and_nothing_else(tmp_path_factory, cuts):
    data = GOOD
    for where, gone, new in cuts:
        data = data[:where] + new + data[where + gone :]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(FolderError):
        tensors = safe.read_tensors(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(data)
    path.write_bytes(data[8:-30])
    with contextlib.suppress(FolderError):
        safe.read_json(path)


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(0x80)  # the file's first byte is 0x80
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
    assert safe.read_tensors(path)["a"].tolist() == [7]
