"""X-LoRA: mix trained LoRA experts, anew for each token and layer.  Buehler & Buehler 2024, arXiv:2402.07148.

    y' = W x + b + w sum_k s_k B_k A_k x            s = softmax(classifier(h) / t)

A_k: (R, I)   B_k: (O, R)   K experts, which stay as they are unless `train_experts`; their own alpha / rank is part of
B_k, and one of a lower rank is filled up with zeros.   h: (B, T, D), the last hidden states without experts: the body
runs twice, the first time without gradients, to get h.   s: (B, T, K), or (B, T, L, K) with `layerwise`.
t: temperature.   A layer that reads one vector per row (a pooler) takes the scalings of the first token.
Fresh experts have B = 0 and start from the base model; trained ones do not.   Trainable parameters: (D + 1) K of the
classifier, K L with `layerwise`; with `depth` n > 1 (D + 1) H + (n - 2) (H + 1) H + (H + 1) K; with `train_experts`
K R (I + O) per site besides.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.blocks import blocks
from ..core.checks import require_above_zero, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import AttachError, require
from ..core.experts import ExpertsAdapter, body_of, expert_at, live_in, sites_of
from ..core.layers import EmbeddingKind, LinearKind
from ..core.method import Method, method
from ..core.replayed_mlp import ReplayedMLP, without_checkpoints
from ..core.running import Running
from ..core.site import Site
from ..core.targets import Resolution, Targets, body_layers


@method("xlora")
@dataclass(frozen=True, kw_only=True)
class XLoRA(Method):
    """A mixture of LoRA adapters that live in the model: load them, then add this one, which copies them.

    experts: their names.   rank: R; that of the experts where they live in the model.
    train_experts: train them too; where none of that name lives in the model they are fresh.
    depth, width: the classifier's layers, and the width H of those between.   dropout: after each of these.
    layerwise: other scalings for every layer.   temperature: lower is sharper.   softmax: False leaves scalings raw.
    top_k: keep only the k largest of a token's scalings.   softmax_top_k: a softmax over these.
    scale: w.   pass_value: the scaling of all experts in the first run.
    """

    experts: tuple[str, ...] = ("0", "1")
    rank: int = 8
    train_experts: bool = False
    depth: int = 1
    width: int = 2048
    dropout: float = 0.2
    layerwise: bool = False
    temperature: float = 1.0
    softmax: bool = True
    top_k: int | None = None
    softmax_top_k: bool = False
    scale: float = 1.0
    pass_value: float = 0.0

    summary = "y' = W x + sum_k s_k B_k A_k x, s by token"
    paper = "Buehler & Buehler 2024, arXiv:2402.07148"
    disk = DiskNames(
        "XLORA",
        fields={
            "train_experts": "use_trainable_adapters",
            "depth": "xlora_depth",
            "width": "xlora_size",
            "dropout": "xlora_dropout_p",
            "layerwise": "layerwise_scalings",
            "temperature": "softmax_temperature",
            "softmax": "enable_softmax",
            "top_k": "top_k_lora",
            "softmax_top_k": "enable_softmax_topk",
            "scale": "global_scaling_weight",
            "pass_value": "scaling_pass_value",
        },
        ignored=("adapters", "hidden_size"),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        super().__post_init__()

    def check(self) -> None:
        K = len(self.experts)
        require(K > 0 and len(set(self.experts)) == K, f"experts are {self.experts}; name each of them once")
        require_whole(self, "rank", "depth", "width")
        require_share(self, "dropout")
        require_above_zero(self, "temperature")
        require(self.top_k is None or 1 <= self.top_k <= K, f"top_k is {self.top_k}; it is 1 to {K}, or None")
        require(not self.softmax_top_k or self.top_k is not None, "softmax_top_k needs top_k")
        require(
            self.top_k is None or not self.pass_value,
            f"pass_value is {self.pass_value} for all experts, and of equals top_k finds no largest; set it to 0",
        )

    def accepts(self, site: Site) -> str | None:
        if site.kind is None and hasattr(site.layer, "get_input_embeddings"):
            return None  # the body, whose hidden states are read
        if site.parameter is not None or not isinstance(site.kind, LinearKind | EmbeddingKind):
            return f"X-LoRA scales by token, and {type(site.layer).__name__} is no layer that is called on tokens"
        return None

    def fitted(self, model: nn.Module) -> "XLoRA":
        fresh = not live_in(model, self.experts, "XLoRA", or_fresh=self.train_experts)
        return self if fresh else fitted_to(self, model)

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        paths, left_out = body_layers(model)
        inside = tuple(f"{block}." for block in blocks(model))
        outside = [path for path in paths if not path.startswith(inside)]
        left_out |= dict.fromkeys(outside, "outside the blocks, so not called on tokens")
        return [path for path in paths if path.startswith(inside)], left_out

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        return Resolution(model, (body_of(model), *found.sites), found.passed_over)

    def build(self, site: Site) -> Adapter:
        return XLoRABody(site) if site.kind is None else XLoRAAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Classifier":
        return Classifier(self, sites)


def fitted_to(method: XLoRA, model: nn.Module) -> XLoRA:
    """The method with the places and the rank of its experts, which live in the model."""
    sites = sites_of(model, method.experts)
    ranks = [expert.factors()[0].shape[0] for s in sites for name in method.experts if (expert := expert_at(s, name))]
    targets = Targets.exactly(site.path for site in sites) if method.targets.is_auto else method.targets
    return replace(method, targets=targets, rank=max(ranks))


class Classifier(ReplayedMLP):
    """What turns hidden states into scalings; `running` holds these: of tokens, of all experts alike, or None."""

    def __init__(self, method: XLoRA, sites: tuple[Site, ...]) -> None:
        layers = [site.name for site in sites if site.kind is not None]
        classes = len(method.experts) * (len(layers) if method.layerwise else 1)
        D = cast(Any, sites[0].layer).config.hidden_size
        super().__init__(sites[0], [D, *[method.width] * (method.depth - 1), classes], method.dropout)
        self.method, self.running = method, Running()
        self.number = {name: i if method.layerwise else 0 for i, name in enumerate(layers)}

    def forward(self, hidden: Tensor) -> Tensor:
        """Scalings (B, T, L, K), L = 1 unless layerwise, of hidden states (B, T, D) that have no gradient."""
        return self.replayed(hidden, self._scalings)

    def _scalings(self, logits: Tensor) -> Tensor:
        method = self.method
        s = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(
            *logits.shape[:-1], -1, len(method.experts)
        )  # (B, T, L, K)
        if method.softmax:
            s = (s / method.temperature).softmax(-1)
        if method.top_k is not None:
            left_out = torch.ones_like(s, dtype=torch.bool).scatter(-1, s.topk(method.top_k, dim=-1).indices, False)
            s = s.masked_fill(left_out, -math.inf).softmax(-1) if method.softmax_top_k else s.masked_fill(left_out, 0)
        return method.scale * s


class XLoRABody(Adapter):
    """At the model's body: its first run, for the scalings of the second."""

    by_row = weightable = mergeable = starts_as_base = False

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        shared, cache = cast(Classifier, self.shared), kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise AttachError("X-LoRA reads the whole sequence at every step, without a cache: use_cache=False")
        first = {name: value for name, value in (("past_key_values", None), ("use_cache", False)) if name in kwargs}
        shared.running.value = shared.method.pass_value * shared.method.scale or None
        with torch.no_grad(), without_checkpoints(self.site.layer):
            hidden = call(*args, **kwargs | first)[0]
        shared.running.value = shared(hidden)
        return call(*args, **kwargs)


class XLoRAAdapter(ExpertsAdapter):
    """The experts of one layer."""

    by_row = weightable = False

    def __init__(self, method: XLoRA, site: Site) -> None:
        super().__init__(site, method.experts, method.rank, trained=method.train_experts)

    def prepare(self) -> None:
        super().prepare()
        self.number = cast(Classifier, self.shared).number[self.site.name]

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y, s = call(x, *args, **kwargs), cast(Classifier, self.shared).running.value
        if s is None:
            return y
        h = self.site.project(x, self.A)  # (B, T, K R)
        if isinstance(s, Tensor):
            s = self._of_tokens(s[:, :, self.number], h).to(h.dtype)  # (B, T, K)
            h = (h.view(*s.shape, self.rank) * s[..., None]).flatten(-2)
        else:
            h = h * s
        return torch.add(y, self.site.expand(h, self.B).to(y.dtype))

    def _of_tokens(self, s: Tensor, h: Tensor) -> Tensor:
        """Scalings for the vectors that the layer reads: tokens, tokens in one long row, or one for each row."""
        B, T = s.shape[:2]
        if h.shape[:-1] == (B, T):
            return s
        if h.shape[:-1] == (B,):
            return s[:, 0]
        if h.shape[:-1] == (B * T,):
            return s.flatten(0, 1)
        raise AttachError(f"{self.site.name} reads {tuple(h.shape[:-1])} vectors, the model {B} rows of {T} tokens")
