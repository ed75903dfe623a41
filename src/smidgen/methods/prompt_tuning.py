"""Prompt tuning: learned vectors in front of the embedded tokens.  Lester et al. 2021, arXiv:2104.08691, section 2.

    model([P; embed(tokens)])        P: (N, E)        N = length, E = width of the embedding

Trainable parameters: N E.  In an encoder-decoder the prompt stands in front of the encoder's input.

How it is done: the model's call gets N further token ids in front, ids that the vocabulary does not have, and while it
runs the embedding gives P for them.  So the model sees a longer sequence of tokens, and everything in it that goes by
token ids stays right: which token is the last before the padding, where an image belongs, positions, shared embeddings.
"""

import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.attach import PLAN, bare_call, is_adapted
from ..core.composition import Plan
from ..core.disk_names import DiskNames
from ..core.errors import AttachError, TargetError, require
from ..core.layers import EmbeddingKind
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.targets import Resolution

_OTHER_PASTS = ("cache_params", "state", "mems")  # in which recurrent models keep what they have read
_SAMPLE = 1024  # tokens whose vectors give the scale of a random prompt


@method("prompt_tuning")
@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Learned vectors before the token embeddings.

    A fresh prompt is not the base model: the tokens attend to it.

    length: N; 5 to 100 is usual, small models need more.
    init: "random" draws from the scale of the embedding, "vocabulary" starts from the vectors of random tokens, "text"
        from those of `init_ids`, repeated or cut to the length.   The paper finds the last two better in small models.
    init_ids: token ids of a text that describes the task, or of the class labels.

    Outputs per token (logits, hidden states, start and end logits) come back without the prompt; attentions, caches
    and, in the tuples of `return_dict=False`, start and end logits and an encoder's output keep its places.
    """

    length: int = 20
    init: Literal["random", "vocabulary", "text"] = "random"
    init_ids: tuple[int, ...] = ()

    summary = "model([P; embed(tokens)])"
    paper = "Lester et al. 2021, arXiv:2104.08691"
    disk = DiskNames("PROMPT_TUNING", fields={"length": "num_virtual_tokens", "init": "prompt_tuning_init"})

    def check(self) -> None:
        require(
            isinstance(self.length, int) and self.length > 0,
            f"length is {self.length}; a prompt needs a whole number of at least 1",
        )
        known = ("random", "vocabulary", "text")
        require(self.init in known, f'init is "{self.init}"; it is one of {", ".join(known)}')
        object.__setattr__(self, "init_ids", tuple(self.init_ids))
        with_text = self.init == "text"
        require(bool(self.init_ids) == with_text, 'init_ids are the tokens of init="text": give both or neither')

    def accepts(self, site: Site) -> str | None:
        return None if site.parameter is None else "a prompt goes to the model, not to a parameter"

    def resolve(self, model: nn.Module) -> Resolution:
        paths = _places(model)
        modules = dict(model.named_modules())
        if not self.targets.is_auto:
            named = {site.path for site in self.targets.resolve(model, self.accepts).sites}
            if named != set(paths):
                raise TargetError(f"a prompt goes to the model itself, not to {self.targets}: leave targets out")
        return Resolution(model, tuple(Site.at(path, modules[path]) for path in paths))

    def build(self, site: Site) -> Adapter:
        if isinstance(site.kind, EmbeddingKind):
            return PromptVectors(site)
        return PromptMask(self, site) if _has_decoder(site.layer) else PromptTokens(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Prompt":
        return Prompt(self, sites[0])


class Prompt(Shared):
    """P (N, E), which the embedding and the model's call both use."""

    def __init__(self, method: PromptTuning, site: Site) -> None:
        super().__init__()
        self.site, self.init, self.init_ids = site, method.init, method.init_ids
        beyond = [i for i in self.init_ids if not 0 <= i < site.fan_in]
        require(not beyond, f"init_ids {beyond[:5]} are no tokens of a vocabulary of {site.fan_in}")
        self.prompt = site.empty(method.length, site.fan_out)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        layer, device, count = self.site.layer, self.prompt.device, len(self.prompt)
        embed = bare_call(layer) if is_adapted(layer) else layer  # asked, not read: some scale what they give
        if self.init == "text":
            ids = torch.tensor([self.init_ids[i % len(self.init_ids)] for i in range(count)], device=device)
            self.prompt.copy_(embed(ids))
            return
        tokens = count if self.init == "vocabulary" else _SAMPLE
        vectors = embed(torch.randint(self.site.fan_in, (tokens,), generator=generator, device=device))
        if self.init == "vocabulary":
            self.prompt.copy_(vectors)
        else:
            std, mean = torch.std_mean(vectors.to(self.prompt.dtype))
            self.prompt.normal_(generator=generator).mul_(std).add_(mean)


class PromptVectors(Adapter):
    """At the embedding, where P lives; it acts through `PromptTokens`, which knows which call has the prompt's ids."""

    by_row = starts_as_base = weightable = mergeable = False
    shared: Prompt

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: P is shared."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


class Marked:
    """The embedding's plan while a model with a prompt runs: the ids first, first + 1, ... are embedded as P (N, E)."""

    additive = by_row = False

    def __init__(self, prompt: Tensor, first: int, plan: Plan | None) -> None:
        self.prompt, self.first, self.plan = prompt, first, plan

    @property
    def beyond(self) -> int:
        """The first id after those."""
        return self.first + len(self.prompt)

    def __call__(self, call: Call, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = (ids >= self.first) & (ids < self.beyond)
        tokens = ids.masked_fill(own, 0)
        vectors: Tensor = (
            call(tokens, *args, **kwargs) if self.plan is None else self.plan(call, tokens, *args, **kwargs)
        )
        learned = self.prompt[(ids - self.first).clamp(0, len(self.prompt) - 1)].to(vectors.dtype)
        return torch.where(own[..., None], learned, vectors)


class PromptTokens(Adapter):
    """At the model, or at the encoder of an encoder-decoder: N ids in front, and all that counts tokens made longer.

    A call whose key/value cache holds something is a later step of generation: the prompt is in the cache already.
    """

    by_row = starts_as_base = weightable = mergeable = False
    shared: Prompt

    def __init__(self, method: PromptTuning, site: Site) -> None:
        super().__init__(site)
        self.length = method.length
        self.names = tuple(inspect.signature(site.layer.forward).parameters)
        self.is_encoder = site.path != ""  # of a model whose decoder reads all that comes out

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: P is shared."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self.names, args, strict=False))
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
        tokens = self._lengthen(kwargs, first)
        embedding[PLAN] = Marked(self.shared.prompt, first, before)
        try:
            out = call(**kwargs)
        finally:
            embedding[PLAN] = before
        return out if self.is_encoder else _trimmed(out, self.length, tokens.shape[-1] + self.length)

    def _lengthen(self, kwargs: dict[str, Any], first: int) -> Tensor:
        """Put the prompt in front of all that has a place per token.  Returns the tokens as they were, (B, T)."""
        N, ids, embeds = self.length, kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None:
            tokens = ids
            own = torch.arange(first, first + N, device=ids.device, dtype=ids.dtype)
            kwargs["input_ids"] = torch.cat((own.expand(*ids.shape[:-1], N), ids), dim=-1)
        elif embeds is not None:
            tokens = embeds[..., 0]
            prompt = self.shared.prompt.to(embeds.dtype)
            kwargs["inputs_embeds"] = torch.cat((prompt.expand(*embeds.shape[:-2], -1, -1), embeds), dim=-2)
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


class PromptMask(Adapter):
    """At an encoder-decoder: the decoder sees the prompt in the encoder's output, so its mask of that is longer."""

    by_row = starts_as_base = weightable = mergeable = False

    def __init__(self, method: PromptTuning, site: Site) -> None:
        super().__init__(site)
        self.length = method.length
        self.names = tuple(inspect.signature(site.layer.forward).parameters)

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw: P is shared."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self.names, args, strict=False))
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = _in_front(1, self.length, kwargs["attention_mask"])
        out = call(**kwargs)
        if isinstance(out, MutableMapping) and out.get("encoder_last_hidden_state") is not None:
            length = out["encoder_last_hidden_state"].shape[1]
            _cut_named(out, ("encoder_last_hidden_state", "encoder_hidden_states"), self.length, length, 3)
        return out


def _embedding(module: nn.Module) -> nn.Module:
    """The module's token embedding.  Raises TargetError if it has none, or takes no tokens."""
    name = type(module).__name__
    if "input_ids" not in inspect.signature(module.forward).parameters:
        raise TargetError(f"{name} takes no input_ids, so there are no tokens to put a prompt in front of")
    try:
        embedding = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Module) or not isinstance(Site.at("", embedding).kind, EmbeddingKind):
        raise TargetError(
            f"{name} does not tell its token embedding: get_input_embeddings() has to give an nn.Embedding"
        )
    return embedding


def _places(model: nn.Module) -> list[str]:
    """Paths of the embedding, of the module that reads the tokens, and of the model if that is another."""
    reader = model.get_encoder() if _has_decoder(model) else model  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    places = [paths[id(_embedding(reader))], paths[id(reader)]]
    return places if reader is model else [*places, ""]


def _has_decoder(module: nn.Module) -> bool:
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
