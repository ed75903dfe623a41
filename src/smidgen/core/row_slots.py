"""Mixed rows of low-rank adapters on a linear layer: two batched products for a batch, however many adapters it has.

    y[rows of slot s] += c x[rows of slot s] A_s^T B_s^T          A: (S, R, I)   B: (S, O, R)

A slot holds one low-rank change in the dtype that the layer computes in, and serves `width` rows. Smaller ranks are
filled up with zeros; c is the scale of the first adapter, and what others differ by is in their B. The layer keeps its
slots from one composition to the next: of a new one only what is not there is copied.
Before every use the parameters are asked whether they are what was copied.
Why not slices of sorted rows, or one product with all slots and a mask: docs/decisions/0013-mixed-rows-in-slots.md
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Call
from .low_rank import LowRankAdapter, is_bare_linear
from .site import compute_dtype

Terms = tuple[tuple[LowRankAdapter, float], ...]  # a low-rank change: adapters and their weights
Place = tuple[dict[str, Any], str]  # a module's parameters or buffers, and a name among them
Filled = tuple[Tensor, Tensor, float]  # A, B and c
Group = tuple[Terms, tuple[int, ...]]  # a change, and the numbers of the rows that have it
_MOST_PADDED = 1.25  # rows that the slots can serve, over rows


class SlotsPlan:
    """The low-rank changes of some of the `rows` rows of a batch, in the slots that their layer keeps."""

    def __init__(self, groups: Sequence[Group], rows: int, slots: "Slots") -> None:
        self.rows, self.slots = rows, slots
        changes, layout = zip(*groups, strict=True)
        self.width, pieces = _pieces(layout)
        self.own = tuple(own for own, _ in pieces)  # the rows of each slot
        self.content: tuple[Terms, ...] = tuple(changes[group] for _, group in pieces)
        self.adapters = tuple(dict.fromkeys(adapter for terms in self.content for adapter, _ in terms))
        self.order: tuple[int, ...] | None = None  # of these pieces in the layer's slots
        self.straight = self.turned = _Places.of(self.own, self.width)
        self.trained = False

    def run(self, y: Tensor, x: Tensor, call: Call) -> Tensor | None:
        """y (N, ..., O), which `call` gave for x (N, ..., I), with the changes.

        None while an adapter drops entries of its input: then each runs by itself.
        """
        dtype, places = compute_dtype(x), self.straight
        fresh = self._may_be_trained() or torch.compiler.is_compiling() or _in_process_group()
        filled = None if fresh else self.slots.still(self.content, dtype, x.device)
        if filled is None:
            training = [adapter for adapter in self.adapters if adapter.training]  # factors may be drawn anew each call
            if any(adapter.dropout for adapter in training):
                return None
            fresh = fresh or bool(training)
            filled = _stacked(self.content, dtype) if fresh else self.slots.filled(self.content, dtype, x.device)
        A, B, c = filled
        if not fresh:
            places = self._places(self.slots.order)
        rows = x.reshape(self.rows, -1, x.shape[-1])[_on(places.read, x)].to(dtype)  # repeats count as tokens
        h = torch.bmm(rows.reshape(len(A), -1, x.shape[-1]), A.mT)  # (S, width tokens, R)
        out = y.reshape(self.rows, -1, y.shape[-1])
        in_place = not torch.is_grad_enabled() and is_bare_linear(call) and y.is_contiguous()  # nobody else has seen y
        if in_place and isinstance(places.read, slice) and places.kept is None and y.dtype == dtype:
            out[places.read].view(len(A), -1, y.shape[-1]).baddbmm_(h, B.mT, alpha=c)
            return y
        change = torch.bmm(c * h, B.mT).reshape(-1, *out.shape[1:]).to(y.dtype)
        if places.kept is not None:
            change = change[_on(places.kept, x)]
        add = out.index_add_ if in_place else out.index_add
        return add(0, places.write.to(x.device), change).view(y.shape)

    def _places(self, order: tuple[int, ...]) -> "_Places":
        if order is not self.order:
            self.order, self.turned = order, _Places.of(tuple(self.own[piece] for piece in order), self.width)
        return self.turned

    def _may_be_trained(self) -> bool:
        """True once the plan ran where gradients are wanted: not every optimiser's step raises a version."""
        if not self.trained and torch.is_grad_enabled() and any(map(_wants_gradients, self.adapters)):
            self.trained = self.slots.outdated = True
        return self.trained


@dataclass(frozen=True)
class _Places:
    """Which rows go through the slots, one slot after another, and which rows get what comes out."""

    read: slice | Tensor  # (S width,)
    kept: Tensor | None  # those of (S width) that are no padding; None: all
    write: Tensor  # (of those kept)

    @staticmethod
    @functools.lru_cache(maxsize=64)  # the same for every layer
    def of(own: tuple[tuple[int, ...], ...], width: int) -> "_Places":
        """Of the rows that each slot has."""
        read = [row for rows in own for row in (*rows, *rows[:1] * (width - len(rows)))]
        kept = [slot * width + i for slot, rows in enumerate(own) for i in range(len(rows))]
        write = torch.tensor([row for rows in own for row in rows])
        consecutive = read == list(range(read[0], read[0] + len(read)))
        return _Places(
            slice(read[0], read[0] + len(read)) if consecutive else torch.tensor(read),
            torch.tensor(kept) if len(kept) < len(read) else None,
            write,
        )


class Slots:
    """The slots of one layer.  A copy of the layer starts without any."""

    def __init__(self) -> None:
        self.A = self.B = torch.empty(0, 0, 0)
        self.scale = 1.0
        self.held: list[Terms | None] = []  # what stands in each slot; None: nothing that can be used again
        self.sources: dict[Terms, _Source] = {}
        self.ranks: dict[Terms, int] = {}
        self.content: tuple[Terms, ...] = ()
        self.order: tuple[int, ...] = ()
        self.layer = self.watch = _Source()
        self.watched: set[Terms] = set()
        self.outdated = False

    def __reduce__(self) -> Any:
        return Slots, ()

    def distrust(self, adapter: LowRankAdapter) -> None:
        """This adapter may now change without notice: copy it again before its next use."""
        for terms in [terms for terms in self.sources if any(each is adapter for each, _ in terms)]:
            del self.sources[terms]
            self.content = ()

    def still(self, content: tuple[Terms, ...], dtype: torch.dtype, device: torch.device) -> Filled | None:
        """A (S, R, I), B (S, O, R) and c of `content`, if they stand here and nothing has changed since."""
        if content is not self.content or self.A.dtype != dtype or self.A.device != device or self.outdated:
            return None
        return (self.A[: len(content)], self.B[: len(content)], self.scale) if self.watch.is_as_seen() else None

    def filled(self, content: tuple[Terms, ...], dtype: torch.dtype, device: torch.device) -> Filled:
        """The same, copied here where they are not; `order` says which piece of `content` stands in each slot."""
        if self.outdated:
            self.sources, self.outdated = {}, False
        # ordinary tensors, also under inference_mode; whole precision, also under autocast
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            self._fill(content, dtype, device)
        return self.A[: len(content)], self.B[: len(content)], self.scale

    def _fill(self, content: tuple[Terms, ...], dtype: torch.dtype, device: torch.device) -> None:
        if self.watch.is_as_seen() and self.sources.keys() <= self.watched:
            known = self.sources
        else:
            same = self.layer.is_as_seen()
            known = {terms: source for terms, source in self.sources.items() if same and source.is_as_seen()}
        self.content = ()  # until all of it is here
        if not known:
            self.scale = _scale_of(content)
        new = {terms: _factors(terms, self.scale) for terms in content if terms not in known}
        self.ranks |= {terms: len(A) for terms, (A, _) in new.items()}
        site, S, R = content[0][0][0].site, len(content), max(self.ranks[terms] for terms in content)
        fits = len(self.A) >= S and R <= self.A.shape[1] <= 2 * R
        if not fits or (self.A.dtype, self.A.device) != (dtype, device):
            self.A = self.B = torch.empty(0, 0, 0)  # what is there goes before more is asked for
            self.A = torch.zeros(S, R, site.fan_in, dtype=dtype, device=device)
            self.B = torch.zeros(S, site.fan_out, R, dtype=dtype, device=device)
            self.held = [None] * S
        self.held = [terms if terms in known else None for terms in self.held]
        self.order = _order(content, self.held[:S])
        for slot, piece in enumerate(self.order):
            terms = content[piece]
            if self.held[slot] != terms:
                self._put(slot, terms, *(new[terms] if terms in new else _factors(terms, self.scale)))
        standing = dict.fromkeys(terms for terms in self.held if terms)
        self.sources = {terms: known[terms] if terms in known else _source_of(terms) for terms in standing}
        self.ranks = {terms: self.ranks[terms] for terms in standing}
        own = site.layer._parameters  # factors may come from the weight, where it is a plain one
        self.layer = _Source.of((own, name) for name, tensor in own.items() if type(tensor) is nn.Parameter)
        self.watched, self.content = set(content), content
        self.watch = _Source.joined([self.layer, *(self.sources[terms] for terms in self.watched)])

    def _put(self, slot: int, terms: Terms, A: Tensor, B: Tensor) -> None:
        R, self.held[slot] = len(A), None
        self.A[slot, :R], self.B[slot, :, :R] = A, B
        self.A[slot, R:], self.B[slot, :, R:] = 0, 0
        self.held[slot] = terms


@dataclass(frozen=True, eq=False)
class _Source:
    """Tensors that a copy was computed of, and how they were when it was; one entry for each, or each adapter."""

    places: Sequence[Place] = ()
    tensors: Sequence[Tensor] = ()
    aliases: Sequence[Tensor] = ()  # hold the data, so that no other comes to stand at its address
    knowable: Sequence[bool] = ()
    versions: Sequence[int] = ()
    addresses: Sequence[int] = ()
    values: Sequence[dict[str, Any]] = ()
    states: Sequence[tuple[float, bool]] = ()

    @staticmethod
    def of(places: Iterable[Place], adapters: Iterable[LowRankAdapter] = ()) -> "_Source":
        """As they are now."""
        places, values = list(places), [adapter.__dict__ for adapter in adapters]
        tensors = [owner[name] for owner, name in places]
        # a step may change what has a gradient without raising its version; what inference_mode made has no version
        knowable = [not (tensor.is_inference() or (tensor.is_leaf and tensor.grad is not None)) for tensor in tensors]
        versions = [tensor._version if known else -1 for tensor, known in zip(tensors, knowable, strict=True)]
        aliases, addresses = [tensor.detach() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
        return _Source(places, tensors, aliases, knowable, versions, addresses, values, [*map(_state, values)])

    @staticmethod
    def joined(sources: Sequence["_Source"]) -> "_Source":
        """All of these as one."""
        columns = zip(*(vars(source).values() for source in sources), strict=True)
        return _Source(*(list(itertools.chain(*column)) for column in columns))

    def is_as_seen(self) -> bool:
        """True if none of them has changed since."""
        now = [owner.get(name) for owner, name in self.places]  # outside any cache in a large model: touch little
        return (
            all(self.knowable)
            and all(map(operator.is_, now, self.tensors))
            and [*map(_version, now)] == self.versions
            and [*map(Tensor.data_ptr, cast(list[Tensor], now))] == self.addresses
            and [*map(_state, self.values)] == self.states
        )


_version = operator.attrgetter("_version")
_state = operator.itemgetter("scale", "training")


def _tensors_of(*modules: nn.Module) -> Iterator[Place]:
    """Where the tensors stand that these modules hold."""
    for module in itertools.chain(*(module.modules() for module in modules)):
        for owner in (module._parameters, module._buffers):
            yield from ((owner, name) for name, tensor in owner.items() if tensor is not None)


def _source_of(terms: Terms) -> _Source:
    adapters = dict.fromkeys(adapter for adapter, _ in terms)
    return _Source.of(itertools.chain(*map(_places_of, adapters)), adapters)


def _places_of(adapter: LowRankAdapter) -> Iterator[Place]:
    shared = getattr(adapter, "shared", None)
    return _tensors_of(adapter, *([shared] if isinstance(shared, nn.Module) else []))


def _wants_gradients(adapter: LowRankAdapter) -> bool:
    return any(owner[name].requires_grad for owner, name in _places_of(adapter))


def _scale_of(content: tuple[Terms, ...]) -> float:
    return content[0][0][0].scale or 1.0


def _factors(terms: Terms, c: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of a weighted sum, over c; differentiable."""
    A, B = [], []
    for adapter, weight in terms:
        own_A, own_B = adapter.factors()
        scale = adapter.scale * weight / c
        A.append(own_A)
        B.append(own_B if scale == 1 else scale * own_B)  # so that a row is rounded as it is alone
    return (A[0], B[0]) if len(A) == 1 else (torch.cat(A), torch.cat(B, 1))


def _stacked(content: tuple[Terms, ...], dtype: torch.dtype) -> Filled:
    """A (S, R, I), B (S, O, R) and c, computed now; differentiable."""
    c = _scale_of(content)
    factors = {terms: _factors(terms, c) for terms in dict.fromkeys(content)}
    R = max(len(A) for A, _ in factors.values())
    padded = {
        terms: (F.pad(A, (0, 0, 0, R - len(A))).to(dtype), F.pad(B, (0, R - len(A))).to(dtype))
        for terms, (A, B) in factors.items()
    }
    A, B = zip(*(padded[terms] for terms in content), strict=True)
    return torch.stack(A), torch.stack(B), c


def _order(content: tuple[Terms, ...], held: list[Terms | None]) -> tuple[int, ...]:
    """Which piece of `content` goes into each slot, so that what is held stays, and the rest in turn."""
    waiting: dict[Terms, list[int]] = {}
    for piece, terms in enumerate(content):
        waiting.setdefault(terms, []).append(piece)
    order: list[int | None] = [None] * len(content)
    for slot, there in enumerate(held):
        if there is not None and waiting.get(there):
            order[slot] = waiting[there].pop(0)
    rest = iter(sorted(itertools.chain(*waiting.values())))
    return tuple(next(rest) if piece is None else piece for piece in order)


@functools.lru_cache(maxsize=64)  # the same for every layer
def _pieces(layout: tuple[tuple[int, ...], ...]) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """For groups of these rows: how many rows a slot serves, and of each slot its rows and the number of its group."""
    width = _width([len(own) for own in layout])
    pieces = [(own[i : i + width], group) for group, own in enumerate(layout) for i in range(0, len(own), width)]
    return width, sorted(pieces)


def _width(counts: Sequence[int]) -> int:
    """How many rows a slot serves, for groups of so many rows: the fewest slots that leave few places empty."""
    slots = {width: sum(-(-count // width) for count in counts) for width in range(1, max(counts) + 1)}
    fitting = [width for width in slots if slots[width] * width <= _MOST_PADDED * sum(counts)]
    return min(fitting, key=lambda width: (slots[width], width))


def _on(index: slice | Tensor, x: Tensor) -> slice | Tensor:
    return index if isinstance(index, slice) else index.to(x.device)


def _in_process_group() -> bool:
    """True where parameters may be shards, whose gathered values come and go behind their version."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
