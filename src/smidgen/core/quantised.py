"""Weights as 4-bit NormalFloat or 8-bit whole numbers: the arithmetic, in plain torch, so that it runs on every device.

    nf4    W[o, i] = c[o, i // 64] v[k]     k: 4 bits, of 16 values v     c: the block's largest magnitude
           c = q t + m                      q: 8 bits, one t for 256 blocks, one m: double quantisation
    int8   W[o, i] = c[o] k                 k: 8 bits                     c: the row's largest magnitude / 127

v: quantiles of the normal distribution: of normal weights each takes as many, and 0 stays 0.
Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.  There q is a float of 8 bits; evenly spaced ones
lose less here.  int8: Dettmers et al. 2022, arXiv:2208.07339, of the weight alone.

A weight is held as named tensors, its pieces.  Nothing here makes more than a block of it dense at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError, require

BLOCK = 64  # entries of a row that share a scale
_SCALES = 256  # such scales that share one
Pieces = dict[str, Tensor]
Read = Callable[
    [slice, slice], Tensor
]  # rows and columns, the latter from a multiple of BLOCK -> (rows, columns), fp32


def normal_float() -> Tensor:
    """The 16 values of NF4 (16,), in fp64, rising from -1 to 1: 8 quantiles up to 0, and 9 from it, scaled to 1."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    # on the CPU also where another device is the default now
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64, device="cpu"))
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64, device="cpu"))
    values = torch.cat([below[:-1], torch.zeros_like(above[:1]), above[:-1].flip(0)])
    return values / values.abs().max()


class Format(ABC):
    """One way of holding a weight (O, I) in few bits."""

    name: ClassVar[str]
    bits: ClassVar[float]  # per weight, scales included

    @abstractmethod
    def empty(self, shape: tuple[int, int], device: torch.device) -> Pieces:
        """Pieces for a weight of this shape, not filled in."""

    @abstractmethod
    def quantised(self, shape: tuple[int, int], blocks: Iterable[tuple[slice, Tensor]], device: torch.device) -> Pieces:
        """The pieces of the weight whose blocks of rows these are.   blocks: rows, and their values (rows, I)."""

    @abstractmethod
    def reader(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> Read:
        """What makes parts of the weight dense."""


class NF4(Format):
    """4-bit NormalFloat with double quantisation; a row that does not end with a block is filled up with zeros."""

    name = "nf4"
    bits = 4 + 8 / BLOCK + 32 / (BLOCK * _SCALES)

    def empty(self, shape: tuple[int, int], device: torch.device) -> Pieces:
        O, blocks = shape[0], -(-shape[1] // BLOCK)
        groups = -(-O * blocks // _SCALES)
        return {
            "packed": torch.empty(O, blocks * BLOCK // 2, dtype=torch.uint8, device=device),  # two to a byte
            "scales": torch.empty(groups, _SCALES, dtype=torch.int8, device=device),
            "scale_steps": torch.empty(groups, dtype=torch.float32, device=device),
            "scale_mean": torch.empty((), dtype=torch.float32, device=device),
        }

    def quantised(self, shape: tuple[int, int], blocks: Iterable[tuple[slice, Tensor]], device: torch.device) -> Pieces:
        pieces = self.empty(shape, device)
        packed, borders = pieces["packed"], _BORDERS.to(device)
        largest = torch.zeros(pieces["scales"].shape, device=device).view(-1)
        per_row = 2 * packed.shape[1] // BLOCK
        for rows, W in blocks:
            values = F.pad(W.to(device, torch.float32), (0, 2 * packed.shape[1] - shape[1])).view(-1, BLOCK)
            c = values.abs().amax(1)
            largest[rows.start * per_row : rows.stop * per_row] = c
            smallest = torch.finfo(torch.float32).tiny  # a block of zeros stays one
            codes = torch.bucketize(values / c.clamp_min(smallest)[:, None], borders, out_int32=True)
            codes = codes.to(torch.uint8).view(-1, packed.shape[1], 2)
            packed[rows] = codes[..., 0] << 4 | codes[..., 1]
        count = shape[0] * per_row
        # in fp64, where a device has it: in fp32 the last bit, and rounded scales with it, are of the number of threads
        wide = torch.float32 if device.type == "mps" else torch.float64
        mean = largest[:count].mean(dtype=wide).float() if count else largest.sum()
        largest[count:] = mean
        off = (largest - mean).view_as(pieces["scales"])
        steps = off.abs().amax(1) / 127
        pieces["scales"].copy_((off / steps.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round())
        pieces["scale_steps"].copy_(steps)
        pieces["scale_mean"].copy_(mean)
        return pieces

    def reader(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> Read:
        packed, pairs = pieces["packed"], _pairs_on(pieces["packed"].device)
        O, I = shape
        scales = (pieces["scales"] * pieces["scale_steps"][:, None]).add_(pieces["scale_mean"]).view(-1)
        per_row = 2 * packed.shape[1] // BLOCK
        scales = scales[: O * per_row].view(O, per_row)

        def read(rows: slice, columns: slice) -> Tensor:
            start, stop, _ = columns.indices(I)
            first, last = start // BLOCK, -(-stop // BLOCK)
            some = packed[rows, first * BLOCK // 2 : last * BLOCK // 2]
            two = torch.index_select(pairs, 0, some.reshape(-1).int())  # one look-up for two values
            values = two.view(torch.float32).view(-1, BLOCK) * scales[rows, first:last].reshape(-1, 1)
            return values.view(some.shape[0], -1)[:, : stop - start]

        return read


class Int8(Format):
    """Whole numbers of 8 bits, and a scale for each row."""

    name = "int8"
    bits = 8.0

    def empty(self, shape: tuple[int, int], device: torch.device) -> Pieces:
        return {
            "packed": torch.empty(shape, dtype=torch.int8, device=device),
            "scales": torch.empty(shape[0], dtype=torch.float32, device=device),
        }

    def quantised(self, shape: tuple[int, int], blocks: Iterable[tuple[slice, Tensor]], device: torch.device) -> Pieces:
        pieces = self.empty(shape, device)
        for rows, W in blocks:
            values = W.to(device, torch.float32)
            c = values.abs().amax(1) / 127
            smallest = torch.finfo(torch.float32).tiny
            pieces["packed"][rows] = (values / c.clamp_min(smallest)[:, None]).round().to(torch.int8)
            pieces["scales"][rows] = c
        return pieces

    def reader(self, shape: tuple[int, int], pieces: Mapping[str, Tensor]) -> Read:
        packed, scales = pieces["packed"], pieces["scales"]
        return lambda rows, columns: packed[rows, columns] * scales[rows, None]


FORMATS: dict[str, Format] = {each.name: each for each in (NF4(), Int8())}


def format_named(name: str) -> Format:
    """The format of this name.  Raises ConfigError."""
    require(name in FORMATS, f'there is no format "{name}" for weights; there are: {", ".join(FORMATS)}', ConfigError)
    return FORMATS[name]


def blocks_of(size: int, width: int, device: torch.device) -> list[slice]:
    """Blocks of `size` rows, or columns, each with `width` entries: what a processor's cache holds, more elsewhere."""
    step = max((1 << 20 if device.type == "cpu" else 1 << 24) // max(width, 1), 1)
    step = -(-step // BLOCK) * BLOCK
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def in_blocks(W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A dense weight (O, I) block by block; small ones, since quantising one makes several tensors of its size."""
    return ((rows, W[rows]) for rows in blocks_of(W.shape[0], 8 * W.shape[1], W.device))


_VALUES = normal_float()
_BORDERS = ((_VALUES[1:] + _VALUES[:-1]) / 2).float()  # (15,): the nearest value is the one between two of them
_BYTES = torch.arange(256, device="cpu")
# (256,): the two values of a byte, 8 bytes in one number
_PAIRS = torch.stack([_VALUES[_BYTES >> 4], _VALUES[_BYTES & 15]], 1).float().contiguous().view(torch.int64).view(-1)

_kept = {_PAIRS.device: _PAIRS}


def _pairs_on(device: torch.device) -> Tensor:
    """The table there, and kept there: at each copy from the host a GPU would wait."""
    if torch.compiler.is_compiling() or device not in _kept:
        there = _PAIRS.to(device)
        if torch.compiler.is_compiling() or type(there) is not Tensor:  # one of FakeTensorMode is for it alone
            return there
        _kept[device] = there
    return _kept[device]
