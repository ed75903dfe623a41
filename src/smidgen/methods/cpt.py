"""Context-aware prompt tuning: examples in front, whose vectors move a little.  Blau et al. 2024, arXiv:2410.17222,
sections 3.2 and 3.3.

    model([E + D; embed(tokens)])        |D_i| <= e_i sqrt(width / 2048)        E = embed(context)        D: (N, width)

N = tokens of the context, e = epsilon of the inputs or of the format.   The tokens of labels do not move (e = 0), and
they are labels too: the loss is over them and the real tokens' labels, an example's weight decay^k if k follow it.
Trainable parameters: the width times the tokens that move.   A fresh prompt is not the base model: it is the examples.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.checks import require_above_zero
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, require
from ..core.method import method
from ..core.prompt_method import PromptMethod, embedded, require_tokens
from ..core.prompts import Prompt, PromptTokens, has_decoder
from ..core.site import Site
from ..core.targets import Resolution

_INPUT = 2  # what a token is, modulo 4; 1 and 3 are format, 0 is a label


@method("cpt")
@dataclass(frozen=True, kw_only=True)
class CPT(PromptMethod):
    """Learned changes to the vectors of examples that stand in front of the tokens, in language models.

    token_ids: the context: examples with their labels, as they would be written in a prompt.
    token_types: what each is: 4 k + 1 format before the input, + 2 input, + 3 format before the label, 4 k + 4 label of
        example k.   By default all 1.
    epsilon, format_epsilon: how far a token of the input, or of the format, may move.
    decay: weight in the loss of each example relative to the next one.   `input_type_mask` in the model's call says the
        types of the real tokens, (B, T); by default all are labels, of one example more.
    """

    token_ids: tuple[int, ...] = ()
    token_types: tuple[int, ...] = ()
    epsilon: float = 0.1
    format_epsilon: float = 0.1
    decay: float = 1.0

    summary = "model([embed(context) + D; embed(tokens)])"
    paper = "Blau et al. 2024, arXiv:2410.17222"
    disk = DiskNames("CPT")

    @property
    def length(self) -> int:  # type: ignore[override]
        """N."""
        return len(self.token_ids)

    def check(self) -> None:
        object.__setattr__(self, "token_ids", tuple(self.token_ids))
        object.__setattr__(self, "token_types", tuple(self.token_types) or (1,) * len(self.token_ids))
        same = len(self.token_ids) == len(self.token_types)
        require(same, f"token_types are {len(self.token_types)}, token_ids {len(self.token_ids)}: one for each")
        require_above_zero(self, "epsilon", "format_epsilon")
        require(0 < self.decay <= 1, f"decay is {self.decay}; it is above 0 and at most 1")

    def resolve(self, model: nn.Module) -> Resolution:
        if not self.token_ids:
            raise ConfigError("token_ids are the tokens of the context that stands in front; there are none")
        if not any(kind % 4 for kind in self.token_types):
            raise ConfigError("token_types says that all tokens of the context are labels, which do not move")
        if has_decoder(model) or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise ConfigError(f"CPT is for causal language models; this is {type(model).__name__}")
        return super().resolve(model)

    def build(self, site: Site) -> Adapter:
        return super().build(site) if site.kind else ContextTokens(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Context":
        return Context(self, sites[0])

    def after_step(self, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        """Projected gradient descent: back to where the tokens may be."""
        context = cast(Context, next(iter(adapters.values())).shared)
        context.prompt.copy_(context.within())


class Context(Prompt):
    """The vectors of the tokens that move, as they are now: (M, E)."""

    start: Tensor  # (N, E), from the base
    rows: Tensor  # (M,), of the tokens that move

    def __init__(self, method: CPT, site: Site) -> None:
        super().__init__(site)
        require_tokens(site, method.token_ids)
        self.ids = method.token_ids
        moving = [row for row, kind in enumerate(method.token_types) if kind % 4]
        epsilon = [method.epsilon if method.token_types[row] % 4 == _INPUT else method.format_epsilon for row in moving]
        self.bounds = tuple(e * (site.fan_out / 2048) ** 0.5 for e in epsilon)
        self.moving = tuple(moving)
        self.prompt = site.empty(len(moving), site.fan_out)
        self.register_buffer("start", site.empty(len(self.ids), site.fan_out).detach(), persistent=False)
        self.register_buffer("rows", torch.empty(len(moving), dtype=torch.long), persistent=False)

    def prepare(self) -> None:
        self.start.copy_(embedded(self.site, self.ids))
        self.rows = torch.tensor(self.moving, device=self.start.device)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        self.prompt.copy_(self.start[self.rows])

    def forward(self) -> Tensor:
        prompt = self.prompt + (self.within() - self.prompt).detach()  # the gradient is of where they are
        return self.start.index_copy(0, self.rows, prompt)

    @torch.no_grad()
    def within(self) -> Tensor:
        """The nearest to `prompt` that is within the bounds."""
        start = self.start[self.rows]
        moved = self.prompt - start
        share = self.prompt.new_tensor(self.bounds)[:, None] / moved.norm(dim=1, keepdim=True)
        return torch.where(share < 1, start + moved * share, self.prompt)


class ContextTokens(PromptTokens):
    """At the model: the context in front, and the loss over its labels too."""

    def __init__(self, method: CPT, site: Site) -> None:
        super().__init__(method.length, site)
        self.ids, self.types, self.decay = method.token_ids, method.token_types, method.decay

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs = self.named(args, kwargs)
        labels, types = kwargs.pop("labels", None), kwargs.pop("input_type_mask", None)
        if labels is None:
            return super().forward(call, **kwargs)

        def with_loss(**inner: Any) -> Any:
            out = call(**inner)
            if not isinstance(out, MutableMapping):
                return self.loss(out[0], labels, types), *out
            out["loss"] = self.loss(out["logits"], labels, types)
            return out

        return super().forward(with_loss, **kwargs)

    def loss(self, logits: Tensor, labels: Tensor, types: Tensor | None) -> Tensor:
        """The mean over all labels of weight times cross-entropy.   logits: (B, N + T, V)   labels, types: (B, T)."""
        B, types = len(labels), torch.full_like(labels, 4) if types is None else types.to(labels)
        context = labels.new_tensor(self.types)
        after = -(-max(self.types) // 4) * 4  # whole examples: what a token is stays the same
        every = torch.cat((context.expand(B, -1), torch.where(types > 0, types + after, types)), dim=1)  # (B, N + T)
        targets = torch.cat((labels.new_tensor(self.ids).expand(B, -1), labels), dim=1)
        is_label = (every > 0) & (every % 4 == 0)
        targets, every = targets.where(is_label, -100)[:, 1:], every.where(is_label, 0)[:, 1:]
        logits = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        weights = self.decay ** _following(every).to(losses.dtype) * (targets != -100)
        return (losses.view_as(targets) * weights).sum() / (targets != -100).sum()


def _following(examples: Tensor) -> Tensor:
    """How many other examples come after each token's own, by number; 0 is none.   (B, L) -> (B, L)."""
    ordered, order = examples.sort(dim=1)
    steps = torch.cat((ordered[:, :1] > 0, ordered[:, 1:] != ordered[:, :-1]), dim=1).cumsum(dim=1)
    return torch.empty_like(steps).scatter(1, order, steps[:, -1:] - steps)
