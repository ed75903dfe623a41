"""Rows that several documents share: a mask that says so, and attention that is computed document by document.

    softmax(q k^T + mask) v      mask: a token sees those of its own document, up to itself

Given a mask, PyTorch multiplies all pairs of a row, T^2, and not by its fastest kernels.  A `DocumentMask` is that
mask, and knows where documents begin: `scaled_dot_product_attention` that gets it multiplies the pairs within documents
alone, L^2 / 2 each.  Everything else that reads it finds a plain tensor of True and False, and what is made of it (with
keys in front, or cut) is one.

    apart     on a processor: one call per document
    varlen    on CUDA in 16 bit: all documents in one call of torch's varlen_attn
    mask      anywhere else, with dropout, and while compiling: as any mask
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Literal["apart", "varlen", "mask"]
_WIDEST = 256  # features of a head in the flash kernels
_AMPERE = (8, 0)  # compute capability that they need


class Piece(NamedTuple):
    """A document of some tokens, or a run of documents of one token each, such as padding."""

    size: int
    is_one: bool


class DocumentMask(Tensor):
    """(B, 1, T, T), True where a token sees another.   starts: (B, T), True where a document begins."""

    starts: Tensor

    @staticmethod
    def of(positions: Tensor) -> "DocumentMask | None":
        """Of positions (B, T) that count 0, 1, ... in each document; None where every row is one document."""
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions.diff(dim=1) != 1
        if not starts[:, 1:].any():
            return None
        document = starts.cumsum(1)
        sees = (document[:, :, None] == document[:, None, :]).tril()
        mask = sees[:, None].as_subclass(DocumentMask)
        mask.starts = starts
        return mask

    @functools.cached_property
    def pieces(self) -> list[list[Piece]]:
        """Of each row, in their order."""
        return [_pieces(row) for row in self.starts.tolist()]

    @functools.cached_property
    def borders(self) -> tuple[Tensor, int]:
        """Where documents begin in all rows one after another, and the end; and how long the longest is."""
        starts = self.starts.flatten().nonzero()[:, 0]
        borders = F.pad(starts, (0, 1), value=self.starts.numel()).int()
        return borders, int(borders.diff().max())

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention and not torch.compiler.is_compiling():
                return _attend(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def way_of(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Way:
    """How attention within documents is computed for these."""
    if dropout or query.ndim != 4 or query.shape[-2] != key.shape[-2]:
        return "mask"
    if query.device.type == "cpu":
        return "apart"
    width = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and width == value.shape[-1] <= _WIDEST and width % 8 == 0
    if query.device.type != "cuda" or not fits or _varlen_attn() is None:
        return "mask"
    return "varlen" if torch.cuda.get_device_capability(query.device) >= _AMPERE else "mask"


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: DocumentMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention.   query: (B, H, T, d)   key, value: (B, Hkv, T, d)   out: (B, H, T, d)."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which knows PyTorch's own attention, and not what is called instead
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    way = way_of(query, key, value, dropout_p)
    if way == "apart":
        return _apart(query, key, value, attn_mask.pieces, scale=scale, enable_gqa=enable_gqa)
    if way == "varlen":
        return _varlen(query, key, value, *attn_mask.borders, scale=scale, enable_gqa=enable_gqa)
    mask = attn_mask.as_subclass(Tensor)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)


def _apart(query: Tensor, key: Tensor, value: Tensor, pieces: list[list[Piece]], **settings: Any) -> Tensor:
    attend: Callable[..., Tensor] = functools.partial(F.scaled_dot_product_attention, is_causal=True, **settings)
    rows = []
    for row, q, k, v in zip(pieces, *(torch.split(x, 1) for x in (query, key, value)), strict=True):
        sizes = [piece.size for piece in row]
        found = []
        for piece, *some in zip(row, *(torch.split(x, sizes, dim=2) for x in (q, k, v)), strict=True):
            if piece.is_one:  # a token that sees itself alone gets its own value
                found.append(some[2].repeat_interleave(query.shape[1] // value.shape[1], dim=1))
            else:
                found.append(attend(*some))
        rows.append(torch.cat(found, dim=2))
    return torch.cat(rows)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    attend: Any = _varlen_attn()
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # (B T, H, d)
    out: Tensor = attend(
        *flat, borders, borders, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=enable_gqa
    )  # a window of all before and none after: causal
    return torch.unflatten(out, 0, (query.shape[0], -1)).transpose(1, 2)


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """torch's attention over documents of any lengths; None where it is not there, or takes no scale or window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(takes) else None


def _pieces(starts: list[bool]) -> list[Piece]:
    first = [t for t, begins in enumerate(starts) if begins]
    sizes = [end - start for start, end in zip(first, [*first[1:], len(starts)], strict=True)]
    found: list[Piece] = []
    for size in sizes:
        if size == 1 and found and found[-1].is_one:
            found[-1] = Piece(found[-1].size + 1, True)
        else:
            found.append(Piece(size, size == 1))
    return found
