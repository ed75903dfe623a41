"""ShadowPEFT: a small network runs beside the model and corrects what its blocks read.  2026, arXiv:2604.19254.

    s_0 = P shadow(x)                                  equations 1 to 7
    h' = h + a U D (h - s)            before a block: h its input, s the shadow's state
    s' = (1 - g) * s + g * t          after it: t = T(h), g = sigmoid(G(h)) of its output h

shadow: a model of the base's own kind with fewer layers, on the base's embeddings; P: a projection if it is narrower.
D: (R, W)   U: (W, R)   W = width of the base; T, G: two layers with a GELU between, `update_width` inside.
U starts at zero, so training starts from the base model.   The last block has no T and G: nothing reads what they give.
While it trains and the model is given labels, the shadow's own loss, by the model's head, is added: equations 8 and 9.
Trainable parameters: the shadow's, and per block 2 R W + 2 (2 u W + u + W) with u = update_width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.blocks import attentions, blocks, output_width
from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import TargetError, require
from ..core.experts import body_of
from ..core.method import Method, Shared, method
from ..core.mirror import GatedUpdate, fill_afresh_, mirror_of, room_in_cache, run_mirror
from ..core.running import Running
from ..core.site import Site
from ..core.targets import Resolution


@method("shadow")
@dataclass(frozen=True, kw_only=True)
class Shadow(Method):
    """A shadow network beside a decoder.

    rank: R.   alpha: a.   dropout: probability of dropping an entry of h - s while training.
    update_width: inside T and G; None is R.   auxiliary_weight: of the shadow's own loss.
    layers, width, attention_heads, inner_width: of the shadow; None is the base's, one for layers.
    share_embeddings: False gives the shadow embeddings of its own, as it has them where its width is another.
    """

    rank: int = 8
    alpha: float = 0.1
    dropout: float = 0.2
    update_width: int | None = None
    auxiliary_weight: float = 0.05
    layers: int | None = None
    width: int | None = None
    attention_heads: int | None = None
    inner_width: int | None = None
    share_embeddings: bool = True

    summary = "h' = h + a U D (h - s), s from a small model beside it"
    paper = "ShadowPEFT, 2026, arXiv:2604.19254"
    disk = DiskNames(
        "SHADOW",
        fields={
            "rank": "r",
            "alpha": "shadow_alpha",
            "dropout": "shadow_dropout",
            "update_width": "update_hidden_size",
            "auxiliary_weight": "auxiliary_loss_weight",
            "layers": "shadow_num_hidden_layers",
            "width": "shadow_hidden_size",
            "attention_heads": "shadow_num_attention_heads",
            "inner_width": "shadow_intermediate_size",
        },
        fixed={"shadow_model": "mirror"},
    )

    def check(self) -> None:
        require_whole(self, "rank", "update_width", "layers", "width", "attention_heads", "inner_width")
        require_share(self, "dropout")
        require(self.auxiliary_weight >= 0, f"auxiliary_weight is {self.auxiliary_weight}; it is at least 0")

    def accepts(self, site: Site) -> str | None:
        if site.kind is not None or not (attentions(site.layer) or hasattr(site.layer, "get_input_embeddings")):
            return f"a shadow follows whole blocks of a decoder, and this is {type(site.layer).__name__}"
        return None

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        return blocks(_decoder_of(model).layer), {}

    def resolve(self, model: nn.Module) -> Resolution:
        body = _decoder_of(model)
        prefix = f"{body.path}." if body.path else ""
        own = [prefix + path for path in blocks(body.layer)]
        found = super().resolve(model) if not self.targets.is_auto else None
        paths = own if found is None else [site.path for site in found.sites]
        first = own.index(paths[0]) if paths[0] in own else 0
        require(
            paths == own[first : first + len(paths)],
            f"the shadow follows blocks of {body.path or 'the model'} that stand one behind another, not {paths[:5]}",
            TargetError,
        )
        top = (Site("", model),) if body.path else ()
        sites = (*top, body, *(Site(path, model.get_submodule(path)) for path in paths))
        return Resolution(model, sites, found.passed_over if found else ())

    def build(self, site: Site) -> Adapter:
        if not hasattr(site.layer, "get_input_embeddings"):
            return BlockAdapter(self, site)
        return BodyAdapter(site) if hasattr(site.layer, "embed_tokens") else LossAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "ShadowNetwork":
        return ShadowNetwork(self, sites)


def _decoder_of(model: nn.Module) -> Site:
    body = body_of(model)
    require(
        hasattr(body.layer, "embed_tokens") and bool(blocks(body.layer)),
        f"a shadow runs beside a decoder with embed_tokens and layers, such as Llama; {type(model).__name__} has none",
        TargetError,
    )
    return body


class ShadowNetwork(Shared):
    """The small model, and P (W, its width) where that is another."""

    def __init__(self, method: Shadow, sites: Sequence[Site]) -> None:
        super().__init__()
        body = next(site for site in sites if hasattr(site.layer, "embed_tokens"))
        config, like = cast(Any, body.layer).config, body.empty(0)
        sizes = {
            "num_hidden_layers": method.layers or 1,
            "hidden_size": method.width,
            "num_attention_heads": method.attention_heads,
            "intermediate_size": method.inner_width,
        }
        self.backbone = mirror_of(body.layer, sizes, like.device).to(like.dtype)
        self.depth, width = int(config.num_hidden_layers), int(cast(Any, self.backbone).config.hidden_size)
        for module in self.backbone.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                cast(Any, module).layer_idx += self.depth  # in a cache its layers come behind the base's
        self.shares = method.share_embeddings and width == config.hidden_size
        if self.shares:
            del self.backbone.embed_tokens
        self.P = body.empty(config.hidden_size, width) if width != config.hidden_size else None
        self.running = Running()
        followed = [site for site in sites if not hasattr(site.layer, "get_input_embeddings")]
        self.paths, u = [site.path for site in followed], method.update_width or method.rank
        self.updates = nn.ModuleList(GatedUpdate(site, config.hidden_size, u) for site in followed[:-1])

    def reset(self, generator: torch.Generator | None) -> None:
        if self.P is not None:
            nn.init.kaiming_uniform_(self.P, a=math.sqrt(5), generator=generator)
        for update in self.updates:
            cast(GatedUpdate, update).reset(generator)
        if not next(self.backbone.parameters()).is_meta:
            fill_afresh_(self.backbone, generator)

    def forward(
        self, embed: nn.Module, like: Tensor, ids: Tensor | None, embedded: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """s_0, by the base's embeddings or by those of the small model, in the dtype of `like`."""
        if embedded is None:
            embedded = (embed if self.shares else self.backbone.embed_tokens)(ids)  # type: ignore[operator]
        state = run_mirror(self.backbone, embedded.to(like.dtype), **kwargs)
        return state if self.P is None else F.linear(state, self.P.to(state.dtype))


class LossAdapter(Adapter):
    """At the whole model: adds the shadow's own loss to the loss that the model computes of its labels."""

    by_row = weightable = mergeable = False

    def __init__(self, method: Shadow, site: Site) -> None:
        super().__init__(site)
        self.weight = method.auxiliary_weight

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        out, labels = call(*args, **kwargs), kwargs.get("labels")
        if self.weight and self.training and labels is not None and getattr(out, "loss", None) is not None:
            head, state = cast(Any, self.site.layer).get_output_embeddings(), cast(Any, self.shared).running.value
            if head is not None:
                logits = head(state)[:, :-1].flatten(0, 1)
                out.loss = out.loss + self.weight * F.cross_entropy(logits.float(), labels[:, 1:].flatten())
        return out


class BodyAdapter(Adapter):
    """At the decoder: runs the small model first."""

    by_row = weightable = mergeable = False

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        shared, body, cache = cast(ShadowNetwork, self.shared), self.site.layer, kwargs.get("past_key_values")
        if cache is not None:
            room_in_cache(cache, shared.depth, len(cast(Any, shared.backbone).layers))
        ids = args[0] if args else kwargs.get("input_ids")
        more = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
        shared.running.value = shared(
            body.embed_tokens, next(body.parameters()), ids, kwargs.get("inputs_embeds"),
            past_key_values=cache, use_cache=cache is not None, **more,
        )  # fmt: skip
        out = call(*args, **kwargs)
        seen, width = getattr(out, "hidden_states", None), out[0].shape[-1]
        if seen is not None:
            out.hidden_states = tuple(h[..., :width] for h in seen)  # what rides between blocks is h and s together
        return out


class BlockAdapter(Adapter):
    """D and U at one block.  Between blocks h and s ride side by side, (B, T, 2 W), as one hidden state."""

    by_row = weightable = mergeable = False

    def __init__(self, method: Shadow, site: Site) -> None:
        super().__init__(site)
        W = int(output_width(site.layer) or 0)
        self.alpha, self.dropout = method.alpha, method.dropout
        self.D, self.U = site.empty(method.rank, W), site.empty(W, method.rank)

    def prepare(self) -> None:
        shared = cast(ShadowNetwork, self.shared)
        self.is_first, self.number = self.site.path == shared.paths[0], shared.paths.index(self.site.path)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.U)

    def forward(self, call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shared, h = cast(ShadowNetwork, self.shared), hidden_states
        if self.is_first:
            s = cast(Tensor, shared.running.value)
        else:
            h, s = h.chunk(2, -1)
        away = F.dropout(h - s, self.dropout) if self.training and self.dropout else h - s
        correction = F.linear(F.linear(away, self.D.to(h.dtype)), self.U.to(h.dtype))
        out = call(torch.add(h, correction.to(h.dtype), alpha=self.alpha), *args, **kwargs)
        h = out[0] if isinstance(out, tuple) else out
        if self.number < len(shared.updates):
            h = torch.cat([h, shared.updates[self.number](h, s)], -1)
        return (h, *out[1:]) if isinstance(out, tuple) else h
