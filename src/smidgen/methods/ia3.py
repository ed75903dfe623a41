"""IA3: scale activations by learned vectors.  Liu et al. 2022, arXiv:2205.05638, section 3.3.

    y' = l * y                      keys, values:                  W' = diag(l) W    b' = l * b
    y' = W (l * x) + b              the feed-forward's inside:     W' = W diag(l)

l: (O,) of a layer's output channels, or (I,) of the input channels of the layers that `feedforward` names: the input of
a feed-forward's output layer is its inner activation.   l starts at 1, so training starts from the base model.
Trainable parameters: O, or I, per site.   Where Hugging Face PEFT has a choice for an architecture it is followed, so
that folders agree; its choice is the paper's but for some that scale queries, and attention.output.dense of BERT.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.blocks import attentions, feedforwards, not_recognised
from ..core.disk_names import DiskNames
from ..core.layers import ConvKind, EmbeddingKind, NormKind
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import Targets

# config.model_type -> what Hugging Face PEFT 0.21 takes, where that is not the keys, values and feed-forward outputs
_QUERY_VALUE = ("q_proj", "v_proj")
_CHOICES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3"), (*_QUERY_VALUE, "down_proj")),
    **dict.fromkeys(("bart", "phi"), (*_QUERY_VALUE, "fc2")),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": (*_QUERY_VALUE, "fc_out"),
    "gpt_neo": (*_QUERY_VALUE, "c_proj"),
    "mt5": ("k", "v", "wi_1"),
}
# the output layer of a feed-forward, as the field names it
_FEEDFORWARD = (
    *("output.dense", "ffn_output", "lin2", "down_proj", "w2", "fc2", "linear2", "wo", "mlp.c_proj", "fc_out"),
    *("dense_4h_to_h", "output_dense", "mlp.Wo"),
)


@method("ia3")
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Scale keys, values and the inside of feed-forwards.  So few numbers want a large learning rate, about 5e-3.

    feedforward: of the targets, those whose input is scaled and not their output, as globs on the path or its end.
    """

    feedforward: tuple[str, ...] = _FEEDFORWARD

    summary = "y' = l * y, or y' = W (l * x) + b"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    disk = DiskNames("IA3", fields={"feedforward": "feedforward_modules"}, tensors={"l": "ia3_l"})

    def __post_init__(self) -> None:
        feedforward = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
        object.__setattr__(self, "feedforward", feedforward)
        super().__post_init__()

    def accepts(self, site: Site) -> str | None:
        if site.kind is None:
            return super().accepts(site)
        if self.scales_input(site) and isinstance(site.kind, EmbeddingKind | NormKind):
            return f"the input of a {site.kind.name} layer cannot be scaled; leave it out of feedforward"
        return None

    def scales_input(self, site: Site) -> bool:
        """True if l scales this layer's input; False if its output."""
        return bool(self.feedforward) and Targets(*self.feedforward).matches(site.name, site.layer)

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        choice = _CHOICES.get(getattr(getattr(model, "config", None), "model_type", ""))
        if choice is not None:
            return [path for path, module in model.named_modules() if Targets(*choice).matches(path, module)], {}
        paths, left_out = [part.output for part in feedforwards(model)], {}
        for part in attentions(model):
            if part.key and part.value:
                paths += [part.key, part.value]
            else:
                left_out[part.path] = (
                    "its keys and values are computed without a call; name in_proj_weight as a parameter"
                )
        if not paths:
            raise not_recognised(model, "attention or feed-forward", 'IA3(targets=["*.key", "*.value", "*.fc2"])')
        return paths, left_out

    def build(self, site: Site) -> "IA3Adapter":
        return (IA3Input if self.scales_input(site) else IA3Output)(site)


class IA3Adapter(Adapter):
    """l at one site, in the shape that Hugging Face PEFT gives it on disk."""

    def __init__(self, site: Site, *shape: int) -> None:
        super().__init__(site)
        kernel = site.stored.ndim - 2 if isinstance(site.kind, ConvKind) else 0
        self.l = site.empty(*shape, *[1] * kernel)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.l)

    def side_scale(self) -> Tensor:
        return self.l.flatten()

    def scaled(self, x: Tensor) -> Tensor:
        """l * x, as x + (l - 1) * x: l itself in bf16 would be off by up to 0.004, often all that was learned."""
        return _stretched(x, self.site.channels(self.l.flatten() - 1, x))


class IA3Output(IA3Adapter):
    """Scales the output: l (O, 1), of a convolution (1, O, 1, 1)."""

    scaled_side = "output"

    def __init__(self, site: Site) -> None:
        channels = site.linear.stack * site.fan_out
        super().__init__(site, *((1, channels) if isinstance(site.kind, ConvKind) else (channels, 1)))

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return self.scaled(call(*args, **kwargs))

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        scale = self.l.flatten()[rows].to(W.dtype)  # (rows,)
        return W * scale[:, None], None if b is None else b * scale


class IA3Input(IA3Adapter):
    """Scales the input: l (1, I), of a convolution (1, C, 1, 1)."""

    scaled_side = "input"

    def __init__(self, site: Site) -> None:
        super().__init__(site, 1, site.linear.input_channels(site.layer))

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return call(self.scaled(x), *args, **kwargs)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.site.linear.scale_columns(self.site.layer, W, self.l.flatten().to(W.dtype), rows), b


def _stretched(x: Tensor, m: Tensor) -> Tensor:
    """x + m * x, for m of x's dtype that broadcasts to it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.addcmul(x, x, m)
    result: Tensor = _Stretched.apply(x, m)  # type: ignore[no-untyped-call]
    return result


class _Stretched(torch.autograd.Function):
    """dx = dy + m * dy at once, where autograd would make both and then their sum.   dm = sum dy * x"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, m)
        return torch.addcmul(x, x, m)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, m = ctx.saved_tensors
        of_x, of_m = ctx.needs_input_grad
        dx = torch.addcmul(dy, dy, m) if of_x else None
        return dx, (dy * x).sum_to_size(m.shape) if of_m else None
