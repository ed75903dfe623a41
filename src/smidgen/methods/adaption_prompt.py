"""LLaMA-Adapter: prompts that attention reads beside the text, behind a gate.  Zhang et al. 2023, arXiv:2303.16199,
section 3.2, equations 5 to 10.

    o = Wo (softmax(q k^T / sqrt(d)) v + g softmax(q K^T / sqrt(d)) V)        K = P Wk^T   V = P Wv^T        P: (N, E)

Wk, Wv, Wo are the attention's own, frozen; N = length, E = features that they read, g = gate, one number per attention.
g starts at 0, so training starts from the base model.   Trainable parameters: N E + 1 per attention, in the topmost.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Call
from ..core.attention import keys_and_values, reach_of, reads_of
from ..core.attention_calls import per_head, with_beside
from ..core.blocks import attentions, not_recognised
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import TargetError
from ..core.method import Method, method
from ..core.prefixes import AttentionAdapter
from ..core.site import Site
from ..core.targets import modules_of


@method("adaption_prompt")
@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(Method):
    """Prompts for the topmost attentions, read beside the text and not in one softmax with it.

    length: N; the paper has 10.
    layers: how many of the topmost self-attentions get one; None is all.  The paper has 30 of 32.
    projected: what the prompts come to goes through the attention's output layer Wo, as in the paper; Hugging Face PEFT
        leaves that out on GPT-2.
    """

    length: int = 10
    layers: int | None = None
    projected: bool = True

    summary = "attention(q, k, v) + g attention(q, P Wk, P Wv)"
    paper = "Zhang et al. 2023, arXiv:2303.16199"
    disk = DiskNames(
        "ADAPTION_PROMPT",
        fields={"length": "adapter_len", "layers": "adapter_layers"},
        tensors={"prompt": "adaption_prompt", "gate": "adaption_gate"},
    )

    def check(self) -> None:
        require_whole(self, "length", "layers")

    def accepts(self, site: Site) -> str | None:
        return accepts_prompt(site)

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        paths = self_attentions(model)
        if not paths:
            raise not_recognised(model, "self-attention", 'AdaptionPrompt(targets="*.self_attn")')
        count = topmost(self.layers, model, paths)
        return paths[len(paths) - count :], dict.fromkeys(paths[: len(paths) - count], "below the topmost layers")

    def build(self, site: Site) -> "PromptBeside":
        return PromptBeside(site, self.length, projected=self.projected)


def accepts_prompt(site: Site) -> str | None:
    """None if an attention can read a prompt beside the text, else why not."""
    name = type(site.layer).__name__
    if site.parameter is not None or reach_of(site.layer) is None or isinstance(site.layer, nn.MultiheadAttention):
        return (
            f"{name} computes no attention that a prompt can stand beside: one through transformers' interface, or "
            "scaled_dot_product_attention"
        )
    return None if reads_of(site.layer) else f"{name} does not tell the layers that make its keys and values"


def self_attentions(model: nn.Module) -> list[str]:
    """Paths of the attentions that can read a prompt beside the text, those to another sequence apart."""
    cross = {part.path for part in attentions(model) if part.cross}
    found = [path for path, module in modules_of(model) if accepts_prompt(Site.at(path, module)) is None]
    return [path for path in found if path not in cross]


def topmost(layers: int | None, model: nn.Module, paths: list[str]) -> int:
    """How many of the self-attentions at these paths are meant.  Raises TargetError if there are fewer."""
    count = len(paths) if layers is None else layers
    if count > len(paths):
        raise TargetError(f"layers is {count}; {type(model).__name__} has {len(paths)} self-attentions")
    return count


class PromptBeside(AttentionAdapter):
    """P (1, N, E) and g (1,) at one attention."""

    def __init__(self, site: Site, length: int, *, projected: bool = True) -> None:
        super().__init__(site)
        features = reads_of(site.layer)
        assert features is not None, f"{site.name} was not accepted"
        self.projected = projected
        self.prompt = site.empty(1, length, features)
        self.gate = site.empty(1)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.prompt, generator=generator)  # the authors' nn.Embedding
        nn.init.zeros_(self.gate)

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        after: list[Tensor] = []

        def beside(query: Tensor, scale: float) -> Tensor:
            change = self.read(query, scale)
            if self.projected:
                return change
            after.append(change.transpose(1, 2).flatten(2))  # (B, T, H d)
            return torch.zeros_like(change[:1, :1, :1])

        out = with_beside(self.site.layer, self.site.name, self.reach, beside, call, *args, **kwargs)
        if self.projected:
            return out
        return (out[0] + after[0], *out[1:]) if isinstance(out, tuple) else out + after[0]

    def read(self, query: Tensor, scale: float) -> Tensor:
        """g softmax(q K^T scale) V: queries (B, H, T, d) -> (B, H, T, d)."""
        _, heads, _, width = query.shape
        held = keys_and_values(self.site.layer, self.prompt.to(query.dtype))
        K, V = (per_head(tensor[0].to(query.dtype), heads, width) for tensor in held)
        if K is None or V is None:
            raise TargetError(
                f"{self.site.name}: keys of width {held[0].shape[-1]} are none for {heads} heads of width {width}"
            )
        # by hand: there are few of them, and torch's function may be what is being changed
        scores = (query @ K.mT * scale).to(torch.promote_types(query.dtype, torch.float32))  # (B, H, T, N)
        weights = scores.softmax(-1).to(query.dtype)
        return weights @ V * self.gate.to(query.dtype)
