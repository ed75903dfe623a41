"""Prompts: learned vectors in front of the embedded tokens, for all methods that differ only in where these come from.

    model([P; embed(tokens)])        P: (N, E), or (B, N, E) with one for each row of the batch

N = length, E = width of the embedding.   In an encoder-decoder the prompt stands in front of the encoder's input.

How it is done: the model's call gets N further token ids in front, ids that the vocabulary does not have, and while it
runs the embedding gives P for them.  So the model sees a longer sequence of tokens, and everything in it that goes by
token ids stays right: which token is the last before the padding, where an image belongs, positions, shared embeddings.
"""

import inspect
from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .adapter import Adapter, ByName, Call
from .attach import PLAN
from .composition import Plan
from .errors import AttachError
from .method import Shared
from .site import Site

_OTHER_PASTS = ("cache_params", "state", "mems")  # in which recurrent models keep what they have read


class Prompt(Shared):
    """What gives P, which the embedding and the model's call both use."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self) -> Tensor:
        """P as it acts in this call: (N, E) or (B, N, E)."""
        raise NotImplementedError

    def take(self, kwargs: dict[str, Any]) -> None:
        """Take from the arguments of the model's call what is for the prompt; it counts until the next `take`."""


class PromptVectors(Adapter):
    """At the embedding, where P lives; it acts through `PromptTokens`, which knows which call has the prompt's ids."""

    by_row = starts_as_base = weightable = mergeable = False
    shared: Prompt

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


class Marked:
    """The embedding's plan while a model with a prompt runs: the ids first, first + 1, ... are embedded as P."""

    additive = by_row = False

    def __init__(self, prompt: Tensor, first: int, plan: Plan | None) -> None:
        self.prompt, self.first, self.plan = prompt, first, plan

    @property
    def beyond(self) -> int:
        """The first id after those."""
        return self.first + self.prompt.shape[-2]

    def __call__(self, call: Call, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = (ids >= self.first) & (ids < self.beyond)
        tokens = ids.masked_fill(own, 0)
        vectors: Tensor = (
            call(tokens, *args, **kwargs) if self.plan is None else self.plan(call, tokens, *args, **kwargs)
        )
        places = (ids - self.first).clamp(0, self.prompt.shape[-2] - 1)  # (B, T)
        if self.prompt.ndim == 2:
            learned = self.prompt[places]
        else:
            learned = self.prompt[torch.arange(len(places), device=ids.device)[:, None], places]
        return torch.where(own[..., None], learned.to(vectors.dtype), vectors)


class PromptTokens(ByName):
    """At the model, or at the encoder of an encoder-decoder: N ids in front, and all that counts tokens made longer.

    A call whose key/value cache holds something is a later step of generation: the prompt is in the cache already.
    """

    by_row = starts_as_base = weightable = mergeable = False
    shared: Prompt

    def __init__(self, length: int, site: Site) -> None:
        super().__init__(site)
        self.length = length
        self.is_encoder = site.path != ""  # of a model whose decoder reads all that comes out

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        if not self.is_encoder:
            self.shared.take(kwargs)
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise AttachError("a static key/value cache has no room for a prompt: use the default cache")
        if other := [name for name in _OTHER_PASTS if kwargs.get(name) is not None]:
            raise AttachError(
                f"whether the prompt is in {other[0]} already cannot be told: generate with use_cache=False"
            )
        if cache is not None and cache.get_seq_length() > 0:
            self._lengthen_mask(kwargs, None)
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + self.length
            return call(**kwargs)
        embedding = self.shared.site.layer.__dict__
        before = embedding[PLAN]
        first = before.beyond if isinstance(before, Marked) else self.shared.site.fan_in  # a Stack has several prompts
        prompt = self.shared()
        tokens = self._lengthen(kwargs, first, prompt)
        embedding[PLAN] = Marked(prompt, first, before)
        try:
            out = call(**kwargs)
        finally:
            embedding[PLAN] = before
        return out if self.is_encoder else _trimmed(out, self.length, tokens.shape[-1] + self.length)

    def _lengthen(self, kwargs: dict[str, Any], first: int, prompt: Tensor) -> Tensor:
        """Put the prompt in front of all that has a place per token.  Returns the tokens as they were, (B, T)."""
        N, ids, embeds = self.length, kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None:
            tokens = ids
            own = torch.arange(first, first + N, device=ids.device, dtype=ids.dtype)
            kwargs["input_ids"] = torch.cat((own.expand(*ids.shape[:-1], N), ids), dim=-1)
        elif embeds is not None:
            tokens = embeds[..., 0]
            own = prompt.to(embeds.dtype).expand(*embeds.shape[:-2], -1, -1)
            kwargs["inputs_embeds"] = torch.cat((own, embeds), dim=-2)
        else:
            raise AttachError(
                f"a prompt goes before input_ids or inputs_embeds; the call gave {', '.join(kwargs) or 'nothing'}"
            )
        self._lengthen_mask(kwargs, tokens)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = _in_front(0, N, kwargs[name])
        if (positions := kwargs.get("position_ids")) is not None:
            own = torch.arange(N, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], N)
            kwargs["position_ids"] = torch.cat((own, positions + N), dim=-1)
        labels = kwargs.get("labels")
        if labels is not None and labels.shape == tokens.shape and not labels.is_floating_point():
            kwargs["labels"] = _in_front(-100, N, labels)  # one per token
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name] + N
        return cast(Tensor, tokens)

    def _lengthen_mask(self, kwargs: dict[str, Any], tokens: Tensor | None) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim > (2 if tokens is None else tokens.ndim):
            raise AttachError(
                "a prompt needs the attention_mask with one number per token (batch, tokens), or none; a mask of more "
                "dimensions has no room for it"
            )
        if self.is_encoder and tokens is not None and mask.shape[-1] > tokens.shape[-1]:
            return  # the model's own call has made it longer
        kwargs["attention_mask"] = _in_front(1, self.length, mask)


class PromptMask(ByName):
    """At an encoder-decoder: the decoder sees the prompt in the encoder's output, so its mask of that is longer."""

    by_row = starts_as_base = weightable = mergeable = False
    shared: Prompt

    def __init__(self, length: int, site: Site) -> None:
        super().__init__(site)
        self.length = length

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        self.shared.take(kwargs)
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = _in_front(1, self.length, kwargs["attention_mask"])
        try:
            out = call(**kwargs)
        finally:
            self.shared.take({})
        if isinstance(out, MutableMapping) and out.get("encoder_last_hidden_state") is not None:
            length = out["encoder_last_hidden_state"].shape[1]
            _cut_named(out, ("encoder_last_hidden_state", "encoder_hidden_states"), self.length, length, 3)
        return out


def has_decoder(module: nn.Module) -> bool:
    return "decoder_input_ids" in inspect.signature(module.forward).parameters and hasattr(module, "get_encoder")


def _in_front(value: int, count: int, tensor: Tensor) -> Tensor:
    return torch.cat((tensor.new_full((*tensor.shape[:-1], count), value), tensor), dim=-1)


def _trimmed(out: Any, count: int, length: int) -> Any:
    """A model's output without the first `count` of its `length` places per token."""
    if isinstance(out, MutableMapping):  # transformers' ModelOutput
        _cut_named(out, ("logits", "last_hidden_state", "hidden_states"), count, length, 3)
        _cut_named(out, ("start_logits", "end_logits"), count, length, 2)
        return out
    return _cut(out, count, length, 3)


def _cut_named(out: MutableMapping[str, Any], names: tuple[str, ...], count: int, length: int, dimensions: int) -> None:
    for name in names:
        if out.get(name) is not None:
            out[name] = _cut(out[name], count, length, dimensions)


def _cut(value: Any, count: int, length: int, dimensions: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut(part, count, length, dimensions) for part in value)
    per_token = isinstance(value, Tensor) and value.ndim == dimensions and value.shape[1] == length
    return value[:, count:] if per_token else value
