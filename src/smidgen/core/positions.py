"""Positions: which tokens of each row a method acts on: the first few and the last few, of a prompt, or all.

    "f1+l1"     the first token of the row and the last       "f7"      the first seven      "l2"      the last two
    "all"       every token, padding and generated ones too

A row is what the model's attention mask leaves of it, on either side; where the call has a language model's labels, it
ends before the first of them, so that training sees the prompt as generation does.   Of a row with fewer tokens than
twice the number, half are its first, half its last: never both.   Later steps of generation are left alone: the prompt
in the key/value cache has been changed already.

A block sees hidden states only, so the module above it that reads the mask is a site too; an adapter there looks on.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import ByName, Call
from .blocks import blocks
from .document_mask import DocumentMask
from .errors import AttachError
from .method import Shared
from .site import Site

_TOKENS = ("input_ids", "inputs_embeds", "src")
_MASKS = {"attention_mask": True, "src_key_padding_mask": False}  # name -> what says that a token is there
_IGNORED = -100  # the label of what a loss leaves out


def first_and_last(positions: str) -> tuple[int, int] | None:
    """How many of the first and of the last; None for "all".  Raises ValueError if it says nothing of the kind."""
    if positions == "all":
        return None
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", positions)
    first, last = (int(number or 0) for number in found.groups()) if found else (0, 0)
    if not first + last or positions.endswith("+") or positions.startswith("+"):
        raise ValueError(f'positions is "{positions}"; it is "all" or of the form "f1+l1", "f1", "l1"')
    return first, last


class Rows(NamedTuple):
    """Where the rows of a batch lie: T tokens each, of which `length` (B,) from `start` (B,) count."""

    size: int
    start: Tensor
    length: Tensor


Seen = Rows | bool  # True: all tokens of all rows; False: a later step of generation


class Reading(Shared):
    """What the readers of a model saw in their last call.

    It stays for the backward, where checkpointed blocks run again; that backward has to come before the next forward.
    """

    def __init__(self, sites: tuple[Site, ...]) -> None:
        super().__init__()
        able = sorted(
            (site.path for site in sites if is_reader(site) and reads_mask(site.layer)), key=len, reverse=True
        )
        places = [site.path for site in sites if not is_reader(site)]
        self.reader_of = {p: next((r for r in able if not r or p.startswith(f"{r}.")), None) for p in places}
        self.seen: dict[str, Seen] = {}
        self.labels: Tensor | None = None


class Reader(ByName):
    """At a module that reads a mask, or labels: passes the call on and keeps what it says of the rows."""

    by_row = mergeable = False
    observes = True
    shared: Reading

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.mask: str | None = None

    def prepare(self) -> None:
        if self.site.path in self.shared.reader_of.values():
            self.mask = next(name for name in _MASKS if name in self.names)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        if self.mask is not None:
            self.shared.seen[self.site.path] = self._seen(given, self.mask)
        if given.get("labels") is None:
            return call(*args, **kwargs)
        self.shared.labels = given["labels"]
        try:
            return call(*args, **kwargs)
        finally:
            self.shared.labels = None

    def _seen(self, given: dict[str, Any], name: str) -> Seen:
        cache, mask, labels = given.get("past_key_values"), given.get(name), given.get("labels", self.shared.labels)
        if cache is not None and cache.get_seq_length() > 0:
            return False
        tokens = next((given[each] for each in _TOKENS if given.get(each) is not None), None)
        if labels is not None and (tokens is None or labels.shape != tokens.shape):
            labels = None  # not one per token
        if mask is not None and not isinstance(mask, DocumentMask):  # its row is taken as one, as without a mask
            if mask.ndim != 2:
                raise AttachError(
                    f"{name} is {tuple(mask.shape)}; to find the first and last tokens it has to be (rows, tokens)"
                )
            there = mask.bool() == _MASKS[name]
        elif labels is not None:
            there = torch.ones_like(labels, dtype=torch.bool)
        else:
            return True
        start, length = there.int().argmax(dim=1), there.sum(dim=1)
        if labels is not None:
            first = (labels != _IGNORED).int().argmax(dim=1)
            is_text = ((labels == _IGNORED) | (labels == tokens)).all()
            length = torch.where(is_text & (first > start), first - start, length)
        return Rows(there.shape[1], start, length)


def reads_mask(module: nn.Module) -> bool:
    """True if the module's call has tokens, and a mask that says which of them are there; a block itself does not."""
    names = inspect.signature(module.forward).parameters
    both = any(name in names for name in _TOKENS) and any(name in names for name in _MASKS)
    return both and blocks(module) != [""]


def is_reader(site: Site) -> bool:
    """True if a `Reader` belongs at this site, and not a method's own adapter."""
    if site.parameter is not None or site.kind is not None:
        return False
    return reads_mask(site.layer) or (not site.path and "labels" in inspect.signature(site.layer.forward).parameters)


def readers_above(model: nn.Module, paths: list[str]) -> list[Site]:
    """The sites that readers of these blocks need: the nearest that reads a mask, and the model if that has labels."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        above = [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]
        nearest = next((owner for owner in above if reads_mask(model.get_submodule(owner))), None)
        if nearest is not None:
            found[nearest] = None
    if found and "labels" in inspect.signature(model.forward).parameters:
        found[""] = None
    return [Site.at(path, model.get_submodule(path)) for path in found]


def add_at(y: Tensor, first: int, last: int, seen: Seen, change: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """The hidden states y (B, T, D), or (B, D) of one token each, with changes added to some of each row.

    change: of states (B, n, D), and whether they are the last ones.  Raises AttachError if `seen` is of another T.
    """
    if seen is False:
        return y
    h = y.reshape(y.shape[0], -1, y.shape[-1])
    if seen is True:
        size = h.shape[1]
        n, m = min(first, max(size // 2, 1) if last else size), min(last, size // 2 if first else size)
        heads, tails = h[:, :n].contiguous(), h[:, size - m :].contiguous()  # else linear maps of them round otherwise
        parts = [heads + change(heads, False) if n else heads, h[:, n : size - m]]
        return torch.cat([*parts, tails + change(tails, True) if m else tails], dim=1).view(y.shape)
    if seen.size != h.shape[1]:
        raise AttachError(
            f"the mask is of {seen.size} tokens, the hidden states of {h.shape[1]}: which are the first and the last "
            'cannot be told. Use positions="all"'
        )
    half, out = seen.length // 2, h
    for count, is_last in ((first, False), (last, True)):
        if not count:
            continue
        both = first and last
        most = (half if is_last else half.clamp(min=1)) if both else seen.length
        steps = torch.arange(count, device=h.device)
        places = seen.start[:, None] + (seen.length[:, None] - 1 - steps if is_last else steps)  # (B, n)
        acts = steps < most[:, None]
        places = places.clamp(0, seen.size - 1)[..., None].expand(-1, -1, h.shape[-1])
        states = h.gather(1, places)
        out = out.scatter_add(1, places, change(states, is_last) * acts[..., None])
    return out.view(y.shape)
