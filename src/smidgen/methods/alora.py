"""aLoRA: a LoRA that acts only from an invocation on, so that what stands before it is read by the base model and its
key/value cache serves both.  Greenewald et al. 2025, arXiv:2504.12397, section 3.

    y_t = W x_t + s B A x_t     at and after the last occurrence of the invocation in a row's tokens
    y_t = W x_t                 before it, and in rows without one

A: (R, I)   B: (O, R)   s = alpha / R.   B starts at zero, so training starts from the base model.
Trainable parameters: R (I + O) per site.

The layers see hidden states only, so the model is a site too: an adapter there finds the invocation in `input_ids` and
lets the call pass.   Later steps of a generation with the same cache go on as the row began.
"""

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, ByName, Call
from ..core.disk_names import DiskNames
from ..core.errors import AttachError, TargetError, require
from ..core.layers import ConvKind
from ..core.method import Shared, method
from ..core.site import Site
from ..core.targets import Resolution
from .lora import DRAWN, LoRA, LoRAAdapter


@method("alora")
@dataclass(frozen=True, kw_only=True)
class ALoRA(LoRA):
    """LoRA's settings, with its random starts.

    invocation_tokens: ids of the tokens that switch the adapter on, such as those of a turn's beginning.
    """

    invocation_tokens: tuple[int, ...] = ()

    summary = "y' = y + s B A x, from the invocation on"
    paper = "Greenewald et al. 2025, arXiv:2504.12397"
    known_starts = DRAWN
    disk = DiskNames(
        "LORA",
        fields={**LoRA.disk.fields, "invocation_tokens": "alora_invocation_tokens"},
        tensors=LoRA.disk.tensors,
        fixed={"alora_invocation_tokens": ...},
    )

    def check(self) -> None:
        super().check()
        object.__setattr__(self, "invocation_tokens", tuple(self.invocation_tokens))
        tokens = self.invocation_tokens
        ids = all(isinstance(token, int) and token >= 0 for token in tokens)
        require(ids, f"invocation_tokens is {tokens}; they are ids of tokens")

    def accepts(self, site: Site) -> str | None:
        if not self.invocation_tokens:
            return "aLoRA acts from some tokens on; say which: invocation_tokens=(5, 17)"
        if reason := super().accepts(site):
            return reason
        if site.parameter or isinstance(site.kind, ConvKind):
            what = "a parameter" if site.parameter else f"a {site.linear.name}"
            return f"aLoRA acts on some tokens of a row, and {what} sees none"
        return None

    def resolve(self, model: nn.Module) -> Resolution:
        names = inspect.signature(model.forward).parameters
        if "input_ids" not in names or "decoder_input_ids" in names:
            what = "takes no input_ids" if "input_ids" not in names else "has two sequences of tokens"
            raise TargetError(f"{type(model).__name__} {what}; aLoRA finds its invocation in the model's input_ids")
        found = super().resolve(model)
        return Resolution(model, (*found.sites, Site.at("", model)), found.passed_over)

    def build(self, site: Site) -> Adapter:  # type: ignore[override]
        return ALoRAAdapter(self, site) if site.path else InvocationReader(site)

    def shared(self, sites: tuple[Site, ...]) -> "Invocation":
        return Invocation(self.invocation_tokens)


class Invocation(Shared):
    """On how many of the last tokens of each row the adapter acts in the current call.

    It stays for the backward, where checkpointed blocks run again.
    """

    def __init__(self, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.tokens = tokens
        self.acting: dict[str, Tensor] = {}  # "rows": (B,)
        self.of_cache: list[weakref.ref[Any]] = []  # the key/value cache of that call, if it had one

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "acting": {}, "of_cache": []}  # a copy has made no call

    def read(self, ids: Tensor, cache: Any) -> None:
        """Find the invocation in ids (B, T).   cache: the key/value cache that the call goes on with, or None."""
        count, size = len(self.tokens), ids.shape[1]
        acting = ids.new_zeros(len(ids))
        if size >= count:
            there = (ids.unfold(1, count, 1) == ids.new_tensor(self.tokens)).all(-1)  # (B, T - count + 1)
            last = (there * torch.arange(1, size - count + 2, device=ids.device)).amax(1)  # counted from 1
            acting = torch.where(last > 0, size - last + 1, 0)
        before = self.acting.get("rows")
        if before is not None and len(before) == len(ids) and self._goes_on(cache):
            acting = torch.where(before > 0, size, acting)
        self.of_cache[:] = [] if cache is None else [weakref.ref(cache)]
        self.acting["rows"] = acting

    def _goes_on(self, cache: Any) -> bool:
        same = cache is not None and any(ref() is cache for ref in self.of_cache)
        return same and cache.get_seq_length() > 0

    def acts_on(self, h: Tensor) -> Tensor:
        """1 for the tokens of h (B, T, R), or (B, R) of one token each, on which the adapter acts, else 0; in its shape
        up to the last dimension.

        Raises AttachError if h is of other rows: tokens without their order, such as an expert's.
        """
        rows = self.acting["rows"]
        if len(h) != len(rows) or h.ndim not in (2, 3):
            raise AttachError(
                f"aLoRA acts on tokens of {len(rows)} rows, and a layer gets {tuple(h.shape[:-1])}: which tokens these "
                "are cannot be told. Leave it out of targets"
            )
        if h.ndim == 2:
            return (rows > 0)[:, None].to(h.dtype)
        T = h.shape[1]
        return (torch.arange(T, device=h.device) >= T - rows[:, None])[..., None].to(h.dtype)


class InvocationReader(ByName):
    """At the model: finds the invocation and passes the call on."""

    by_row = mergeable = False
    observes = True
    shared: Invocation

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = self.named(args, kwargs)
        ids = given.get("input_ids")
        if ids is None:
            raise AttachError("aLoRA finds its invocation in input_ids, and the call has none: give them")
        self.shared.read(ids, given.get("past_key_values"))
        return call(*args, **kwargs)


class ALoRAAdapter(LoRAAdapter):
    """A and B at one site."""

    by_row = mergeable = False
    shared: Invocation

    def __init__(self, method: ALoRA, site: Site) -> None:
        super().__init__(method, site)
        self.plain = False  # some rows change and some do not, so nothing is fused

    def delta(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        h = self.site.project(self.dropped(x), A)  # (B, T, R)
        return self.site.expand(h * self.shared.acts_on(h), B) * self.scale
