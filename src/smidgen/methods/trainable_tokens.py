"""Trainable tokens: train a few rows of an embedding, such as those of new tokens, and leave the others as they are.

    E'[t] = r_t   for each token t that is named          E' = E elsewhere

E: (V, D), one row for each of V tokens.   r: (n, D), whole rows and no changes, so that a folder means the same on a
model whose new rows were drawn anew when its vocabulary was resized.   r starts as E's rows, so training starts from
the base model.   A language model's head may be the embedding itself (tied weights): it then follows, with the same
rows.   In a Stack, what two adapters change of one row adds up.
Trainable parameters: n D per embedding.   No paper: it is what adding tokens needs; Hugging Face PEFT calls it so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.layers import EmbeddingKind, LinearKind
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.targets import Resolution, modules_of


@method("trainable_tokens")
@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Rows of the model's word embedding, or of the layers that are named.

    tokens: the rows to train, by their numbers in the vocabulary: tokenizer.convert_tokens_to_ids(["<new>"]).
    """

    tokens: tuple[int, ...] = ()

    summary = "E'[t] = r_t for a few tokens t"
    paper = "the rows of new tokens, as Hugging Face PEFT's TrainableTokens; no paper"
    disk = DiskNames("TRAINABLE_TOKENS", fields={"tokens": "token_indices"}, kinds=("linear", "embedding"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        super().__post_init__()

    def check(self) -> None:
        bad = [token for token in self.tokens if not isinstance(token, int) or token < 0]
        require(
            not bad, f"tokens holds {bad[:5]}; a token is a whole number of at least 0, its place in the vocabulary"
        )
        twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
        require(not twice, f"tokens names {twice[:5]} more than once")

    def accepts(self, site: Site) -> str | None:
        matrix = site.parameter is not None and site.stored.ndim == 2
        if not matrix and not isinstance(site.kind, LinearKind | EmbeddingKind):
            return f"{type(site.layer).__name__} has no row for each token; name an embedding, or the head beside it"
        if not site.storage.plain:
            return f"its weight is held as {site.storage.name}; leave embeddings and head plain to train their rows"
        if getattr(site.layer, "max_norm", None) is not None:
            return "its max_norm shortens the rows of the base as it reads them"
        if not self.tokens:
            return "no token is named; say which rows to train, tokens=(5, 17)"
        rows = rows_of(site)
        beyond = [token for token in self.tokens if token >= rows]
        return f"it has rows 0 to {rows - 1}, and tokens names {beyond[:5]}" if beyond else None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        if hasattr(model, "get_input_embeddings"):
            words = cast(Any, model).get_input_embeddings()
            found = [path for path, module in modules_of(model) if module is words]
        else:
            found = [path for path, module in modules_of(model) if isinstance(module, nn.Embedding)]
        require(
            len(found) == 1,
            f"{type(model).__name__} has {len(found)} embeddings ({', '.join(found[:5])}) and does not say which is of "
            'words; name it: TrainableTokens(targets="*.embed_tokens", tokens=...)',
            TargetError,
        )
        return found, {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        return Resolution(model, with_tied(model, found.sites), found.passed_over)

    def build(self, site: Site) -> "TrainableTokensAdapter":
        return TrainableTokensAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "TokenRows":
        return TokenRows(self, sites)


def rows_of(site: Site) -> int:
    """V: how many tokens there is a row for."""
    return site.fan_in if isinstance(site.kind, EmbeddingKind) else site.fan_out


def with_tied(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, and after them the layers whose weight is the same tensor as that of one of them."""
    taken = {id(site.layer) for site in sites}
    weights = {id(site.stored) for site in sites if site.parameter is None}
    tied = [
        Site.at(path, module)
        for path, module in modules_of(model)
        if id(module) not in taken and id(module._parameters.get("weight")) in weights
    ]
    return (*sites, *tied)


class TokenRows(Shared):
    """r of every embedding: one for all the layers that are tied to it."""

    def __init__(self, method: TrainableTokens, sites: Sequence[Site]) -> None:
        super().__init__()
        of_weight: dict[int, Site] = {}
        for site in sites:
            of_weight.setdefault(id(site.stored), site)
        first, self.tokens = list(of_weight.values()), list(method.tokens)
        self.sites = first
        self.number = {site.name: first.index(of_weight[id(site.stored)]) for site in sites}
        width = [site.fan_out if isinstance(site.kind, EmbeddingKind) else site.fan_in for site in first]
        self.rows = nn.ParameterList(site.empty(len(self.tokens), D) for site, D in zip(first, width, strict=True))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        for rows, site in zip(self.rows, self.sites, strict=True):
            rows.copy_(base_rows(site, torch.tensor(self.tokens, device=rows.device)))


def base_rows(site: Site, tokens: Tensor) -> Tensor:
    """E of these tokens: (n, D)."""
    W = site.weight()
    return W.T[tokens] if isinstance(site.kind, EmbeddingKind) else W[tokens]  # (n, D)


class TrainableTokensAdapter(AdditiveAdapter):
    """One layer's reading of r.  What is added is r - E of these rows, so at the start exactly nothing."""

    tokens: Tensor
    sorted: Tensor
    order: Tensor

    def __init__(self, method: TrainableTokens, site: Site) -> None:
        super().__init__(site)
        self.named, self.is_embedding = method.tokens, isinstance(site.kind, EmbeddingKind)
        for name in ("tokens", "sorted", "order"):  # sorted = tokens[order]
            self.register_buffer(name, torch.empty(len(method.tokens), dtype=torch.long), persistent=False)

    def prepare(self) -> None:
        self.number = cast(TokenRows, self.shared).number[self.site.name]
        self.tokens = torch.tensor(self.named, device=self.site.stored.device)
        self.sorted, self.order = self.tokens.sort()

    def change(self) -> Tensor:
        """r - E of the tokens' rows: (n, D)."""
        r: Tensor = cast(TokenRows, self.shared).rows[self.number]
        return r - base_rows(self.site, self.tokens)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = call(x, *args, **kwargs)
        if self.is_embedding:
            return torch.add(y, self.delta(x).to(y.dtype))
        return y.index_add(-1, self.tokens, self.site.project(x, self.change()).to(y.dtype))

    def delta(self, x: Tensor) -> Tensor:
        change = self.change()
        if self.is_embedding:
            x = x.long().contiguous()
            place = torch.searchsorted(self.sorted, x).clamp(max=len(self.sorted) - 1)
            is_named = (self.sorted[place] == x)[..., None]
            return self.site.apply(self.order[place], change.to(self.site.stored.dtype).T) * is_named
        few = self.site.project(x, change)  # (..., n)
        return few.new_zeros(*few.shape[:-1], self.site.fan_out).index_add(-1, self.tokens, few)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        change = self.change().to(W.dtype)
        if self.is_embedding:  # its matrix is (D, V)
            return W.index_add(1, self.tokens, change[:, rows].T), b
        start, stop, _ = rows.indices(self.site.fan_out)
        here = (self.tokens >= start) & (self.tokens < stop)
        return W.index_add(0, self.tokens[here] - start, change[here]), b
