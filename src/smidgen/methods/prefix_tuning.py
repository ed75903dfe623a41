"""Prefix tuning: learned keys and values in front of every attention's own.  Li & Liang 2021, arXiv:2101.00190, section
4; for encoders and without the MLP: P-tuning v2, Liu et al. 2021, arXiv:2110.07602.

    softmax(q [K; k]^T / sqrt(d)) [V; v]        K: (N, Dk)   V: (N, Dv)
    [K V] = tanh(E W^T + b) U^T + c             E: (N, Dk)   W: (M, Dk)   U: (Dk + Dv, M)   reparametrised, section 4.3

N = length, D = key/value heads x head width, M = reparametrisation; all sites share E, W and b.  Keys and values are
learned as they act: no position is applied to them, and real tokens stay at the positions they had.  Relative position
biases (T5) are zero towards them.
Trainable parameters: N (Dk + Dv) per site; reparametrised N Dk + M (Dk + 1) once and (M + 1) (Dk + Dv) per site.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter, Call
from ..core.attention import Front, reach_of, register, widths_of, with_in_front
from ..core.disk_names import DiskNames
from ..core.errors import FolderError, TargetError, require
from ..core.method import Method, Shared, method
from ..core.site import Site
from ..core.targets import Resolution


@method("prefix_tuning")
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Learned keys and values in front of every attention: of encoders, decoders and between the two.

    A fresh prefix is not the base model: whatever stands in front takes a share of the attention.

    length: N, positions in front; 10 to 200 is usual, more for generation than for classification.
    reparametrisation: M, the width of the paper's MLP that the prefix is computed by while it is trained; it steadies
        training where the learning rate is high.  None learns K and V directly, as P-tuning v2 does.
    init_std: standard deviation of the random start, of K and V or of the MLP's last layer.  A model's own keys and
        values are often of size 0.5 to 1; a prefix that starts far below is ignored for long.
    shift_positions: count positions of real tokens from N on, as Hugging Face PEFT does, whose prefix sits in the
        cache.  Its folders need it; otherwise it only costs room.
    """

    length: int = 16
    reparametrisation: int | None = None
    init_std: float = 0.02
    shift_positions: bool = False

    summary = "softmax(q [K; k]^T) [V; v]"
    paper = "Li & Liang 2021, arXiv:2101.00190"
    disk = DiskNames("PREFIX_TUNING", fields={"length": "num_virtual_tokens"})

    def check(self) -> None:
        require(
            isinstance(self.length, int) and self.length > 0,
            f"length is {self.length}; a prefix needs a whole number of at least 1",
        )
        width = self.reparametrisation
        require(
            width is None or (isinstance(width, int) and width > 0),
            f"reparametrisation is {width}; it is None or the width of an MLP",
        )
        require(
            math.isfinite(self.init_std) and self.init_std > 0,
            f"init_std is {self.init_std}; it must be a positive number",
        )

    def accepts(self, site: Site) -> str | None:
        name = type(site.layer).__name__
        if site.parameter is not None:
            return "a prefix goes to an attention module, not to a parameter"
        if reach_of(site.layer) is None:
            return (
                f"{name} computes no attention that can be reached: through transformers' attention interface, "
                "scaled_dot_product_attention, or nn.MultiheadAttention without bias_k"
            )
        return (
            None if widths_of(site.layer) else f"{name} does not tell its key and value width (head_dim and num_heads)"
        )

    def auto(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        found = [(path, module) for path, module in model.named_modules() if "smidgen" not in path.split(".")]
        reached = [path for path, module in found if self.accepts(Site.at(path, module)) is None]
        if not reached:
            own = [f"{path} ({type(m).__name__})" for path, m in found if "attention" in type(m).__name__.lower()]
            reason = (
                f"It computes attention by itself in {', '.join(own[:3])}"
                if own
                else "It has no module named attention"
            )
            raise TargetError(f"no attention of {type(model).__name__} can be given a prefix. {reason}")
        return reached, {}

    def resolve(self, model: nn.Module) -> Resolution:
        found = super().resolve(model)
        if not self.shift_positions:
            return found
        _refuse_own_positions(model)
        return Resolution(model, (*found.sites, Site("", model)), found.passed_over)

    def build(self, site: Site) -> "PrefixAdapter | PositionsAdapter":
        if self.shift_positions and reach_of(site.layer) is None:
            return PositionsAdapter(self, site)
        return PrefixAdapter(self, site)

    def shared(self, sites: tuple[Site, ...]) -> "Reparametrisation | None":
        return (
            None if self.reparametrisation is None else Reparametrisation(self.length, self.reparametrisation, sites[0])
        )


class PrefixAdapter(Adapter):
    """K (N, Dk) and V (N, Dv) of one attention module; or the MLP's last layer that gives both.

    Not to be weighted: that would call the attention a second time, which would put the tokens in the cache twice.
    """

    by_row = starts_as_base = weightable = mergeable = False

    def __init__(self, method: PrefixTuning, site: Site) -> None:
        super().__init__(site)
        widths, reach = widths_of(site.layer), reach_of(site.layer)
        assert widths is not None, f"{site.name} was not accepted"
        assert reach is not None, f"{site.name} was not accepted"
        self.widths, self.reach, self.std = widths, reach, method.init_std
        self.learned_directly = method.reparametrisation is None
        if method.reparametrisation is None:
            self.K = site.empty(method.length, widths[0])
            self.V = site.empty(method.length, widths[1])
        else:
            self.weight = site.empty(sum(widths), method.reparametrisation)
            self.bias = site.empty(sum(widths))
        self._register()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()  # in a process that has only unpickled it

    def _register(self) -> None:
        if self.reach.way == "interface":
            register()

    def reset(self, generator: torch.Generator | None) -> None:
        if self.learned_directly:
            nn.init.normal_(self.K, std=self.std, generator=generator)
            nn.init.normal_(self.V, std=self.std, generator=generator)
        else:
            nn.init.normal_(self.weight, std=self.std, generator=generator)
            nn.init.zeros_(self.bias)

    def front(self) -> Front:
        """K and V as they act now, and as they are saved: a reparametrised prefix is written as what it computes."""
        if self.learned_directly:
            return self.K, self.V
        both = F.linear(self.shared(), self.weight, self.bias)
        return both[:, : self.widths[0]], both[:, self.widths[0] :]

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return with_in_front(self.site.layer, self.site.name, self.reach, self.front(), call, *args, **kwargs)


class Reparametrisation(Shared):
    """What all sites' MLPs have in common: the embedding E (N, Dk) and the first layer, W (M, Dk) and b (M,)."""

    def __init__(self, length: int, width: int, site: Site) -> None:
        super().__init__()
        widths = widths_of(site.layer)
        assert widths is not None, f"{site.name} was not accepted"
        self.embedding = site.empty(length, widths[0])
        self.weight = site.empty(width, widths[0])
        self.bias = site.empty(width)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.embedding, generator=generator)
        bound = self.weight.shape[1] ** -0.5  # nn.Linear's own start
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)

    def forward(self) -> Tensor:
        """(N, M)"""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class PositionsAdapter(Adapter):
    """At the model: real tokens stand at positions N, N + 1, ...; it has no parameters."""

    by_row = starts_as_base = weightable = mergeable = False

    def __init__(self, method: PrefixTuning, site: Site) -> None:
        super().__init__(site)
        self.length = method.length
        self.names = tuple(inspect.signature(site.layer.forward).parameters)

    def reset(self, generator: torch.Generator | None) -> None:
        """Nothing to draw."""

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(self.names, args, strict=False))
        positions, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
        if positions is None:
            tokens = kwargs.get("input_ids")
            tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens  # (B, T)
            past = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + past)[None]
        kwargs["position_ids"] = positions + self.length
        return call(**kwargs)


def _refuse_own_positions(model: nn.Module) -> None:
    """Raise TargetError where positions are not counted 0, 1, ... from position_ids."""
    counts_padding = any(
        isinstance(table, nn.Embedding) and table.padding_idx is not None and path.endswith("position_embeddings")
        for path, table in model.named_modules()
    )
    if counts_padding or "position_ids" not in inspect.signature(model.forward).parameters:
        raise TargetError(
            f"shift_positions: {type(model).__name__} does not count its positions from position_ids as 0, 1, ..., "
            "so they cannot be shifted"
        )


def to_peft(fronts: Sequence[Front]) -> Tensor:
    """K and V of all layers, in their order, as Hugging Face PEFT's `prompt_embeddings` (N, layers 2 D).

    It says the same there only with shift_positions.   Raises FolderError if the widths differ: that format has one.
    """
    widths = {tensor.shape[1] for front in fronts for tensor in front}
    if len(widths) != 1:
        raise FolderError(f"Hugging Face PEFT's prefixes are of one width in all layers; these have {sorted(widths)}")
    return torch.cat([tensor for front in fronts for tensor in front], dim=1)


def from_peft(prompt_embeddings: Tensor, layers: int) -> list[Front]:
    """K and V of each layer from Hugging Face PEFT's `prompt_embeddings` (N, layers 2 D).

    Raises FolderError if the tensor does not divide by the layers.
    """
    shape = tuple(prompt_embeddings.shape)
    if len(shape) != 2 or shape[1] % (2 * layers):
        raise FolderError(f"prompt_embeddings is {shape}; keys and values of {layers} layers do not fit in")
    parts = prompt_embeddings.chunk(2 * layers, dim=1)
    return list(zip(parts[::2], parts[1::2], strict=True))
