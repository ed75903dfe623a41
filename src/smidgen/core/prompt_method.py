"""What all methods that learn a prompt have in common: where it lives and starts.  How it acts: prompts.py."""

import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .attach import bare_call, is_adapted
from .errors import TargetError, require
from .layers import EmbeddingKind
from .method import Method
from .prompts import Prompt, PromptMask, PromptTokens, PromptVectors, has_decoder
from .site import Site
from .targets import Resolution

_SAMPLE = 1024  # tokens whose vectors give the scale of a random prompt


class PromptMethod(Method):
    """A method whose `shared` is a `Prompt`; it lives at the embedding and at the model.

    A fresh prompt is not the base model: the tokens attend to it.  Outputs per token (logits, hidden states, start and
    end logits) come back without the prompt; attentions, caches and, in the tuples of `return_dict=False`, start and
    end logits and an encoder's output keep its places.
    """

    length: int  # N

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
        return PromptMask(self.length, site) if has_decoder(site.layer) else PromptTokens(self.length, site)


class LearnedPrompt(Prompt):
    """P itself is learned; it starts at random, at the scale of the embedding."""

    def __init__(self, length: int, site: Site) -> None:
        super().__init__(site)
        self.prompt = site.empty(length, site.fan_out)

    def reset(self, generator: torch.Generator | None) -> None:
        at_scale_(self.prompt, self.site, generator)

    def forward(self) -> Tensor:
        return self.prompt


@torch.no_grad()
def embedded(site: Site, ids: Sequence[int] | Tensor) -> Tensor:
    """The vectors (N, E) that the bare embedding gives for ids: asked, not read, for some scale what they give."""
    layer, ids = site.layer, torch.as_tensor(ids, device=site.stored.device)
    return cast(Tensor, bare_call(layer)(ids) if is_adapted(layer) else layer(ids))


def require_tokens(site: Site, ids: Sequence[int]) -> None:
    """Raise ConfigError for ids beyond the embedding's vocabulary."""
    beyond = [i for i in ids if not 0 <= i < site.fan_in]
    require(not beyond, f"{beyond[:5]} are no tokens of a vocabulary of {site.fan_in}")


@torch.no_grad()
def at_scale_(prompt: Tensor, site: Site, generator: torch.Generator | None) -> None:
    """Fill with random numbers of the mean and the deviation that the embedding's vectors have."""
    ids = torch.randint(site.fan_in, (_SAMPLE,), generator=generator, device=prompt.device)
    std, mean = torch.std_mean(embedded(site, ids).to(prompt.dtype))
    prompt.normal_(generator=generator).mul_(std).add_(mean)


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
    reader = model.get_encoder() if has_decoder(model) else model  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    places = [paths[id(_embedding(reader))], paths[id(reader)]]
    return places if reader is model else [*places, ""]
