"""LoRA: add a low-rank matrix to a weight.  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    W' = W + s B A          s = alpha / R, or alpha / sqrt(R) rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)

A: (R, I)   B: (O, R)   I = fan-in, O = fan-out, R = rank.   B starts at zero, so training starts from the base model
(on an embedding A does, as in the authors' code).   Trainable parameters: R (I + O) per site, O more with `bias_on_B`.

Other starts are in core/starts.py.  Some begin with A0, B0 that are not zero, and would take s B0 A0 out of the weight.
The base is never touched; instead

    W' = W + s (B A - B0 A0) = W + s ((B - B0) A + B0 (A - A0)),

which at the start is W to the last bit.  A0 and B0 are kept with A and B.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..core import starts
from ..core.checks import require_finite, require_one_of, require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import LinearKind
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.starts import Factors
from ..core.targets import Targets, last_match

Drawn = Literal["kaiming", "gaussian", "orthogonal"]
OfData = Literal["eva", "corda_ipm", "corda_kpm", "lora_ga"]
Start = Literal[Drawn, "pissa", "pissa_fast", "olora", "mica", OfData]
DRAWN, OF_DATA = get_args(Drawn), get_args(OfData)
SUBTRACTED = ("pissa", "pissa_fast", "olora", "corda_ipm", "corda_kpm", "lora_ga")


@method("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank change of a weight.

    rank: R; 4 to 64 is usual.   alpha: the change is scaled by alpha / R.
    rank_stabilised: scale by alpha / sqrt(R) instead, so that large ranks keep learning.
    dropout: probability of dropping an entry of the adapter's input while training.
    dropout_on: "elements" draws a mask per entry of the input, as the paper does; "features" one per input feature
        and call, which costs next to nothing.
    start: "kaiming", the authors'; "gaussian", A from N(0, 1/R^2); "orthogonal", "pissa", "olora", "mica" (B is not
        trained), as in core/starts.py; "pissa_fast" by a randomised SVD.  "eva", "corda_ipm", "corda_kpm" and "lora_ga"
        need data: attach what `choose` returns.  See core/data_starts.py.
    bias_on_B: B has a bias, so that s * bias joins the layer's own.
    rank_pattern, alpha_pattern: other values for the sites that a glob matches: {"*.q_proj": 16}; the last one counts.
    """

    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    dropout: float = 0.0
    dropout_on: Literal["elements", "features"] = "elements"
    start: Start = "kaiming"
    bias_on_B: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    summary = "W' = W + s B A"
    paper = "Hu et al. 2021, arXiv:2106.09685"
    faster = ("B", "bias")
    disk = DiskNames(
        "LORA",
        fields={
            "rank": "r",
            "alpha": "lora_alpha",
            "rank_stabilised": "use_rslora",
            "dropout": "lora_dropout",
            "bias_on_B": "lora_bias",
        },
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"},
    )
    known_starts: ClassVar[tuple[str, ...]] = get_args(Start)
    chosen: ClassVar[Mapping[str, Factors]] = {}  # by site: what `choose` found for A and B
    of_changed_base: ClassVar[bool] = False  # A0 and B0 are not in the folder being read: they follow from the base

    def check(self) -> None:
        require_whole(self, "rank")
        require_finite(self, "alpha")
        require_share(self, "dropout")
        require_one_of(self, "dropout_on", ("elements", "features"))
        require_one_of(self, "start", self.known_starts)
        for rank in (self.rank, *self.rank_pattern.values()):
            even = self.start != "orthogonal" or rank % 2 == 0
            require(even, f'rank is {rank}; start="orthogonal" halves it, so it has to be even')
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            can_be = alpha > 0 or self.start not in SUBTRACTED
            require(can_be, f'alpha is {alpha}; start="{self.start}" needs one above 0')
        has_bias = self.name in ("lora", "lora_fa")
        require(has_bias or not self.bias_on_B, f"{self.name} has no bias_on_B; set it to False")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.bias_on_B and site.parameter:
            return "bias_on_B adds to what a layer gives, and this is a parameter; set it to False"
        if self.start in DRAWN:
            return None
        of_inputs = self.start in ("eva", "corda_ipm", "corda_kpm")
        if of_inputs and (site.parameter or not isinstance(site.kind, LinearKind)):
            return f'start="{self.start}" reads the inputs of linear layers'
        if self.start == "eva":
            return None
        if not (site.storage.plain if self.start == "lora_ga" else site.storage.readable):
            verb = "takes its gradient" if self.start == "lora_ga" else "has to read it"
            return f'its weight is held as {site.storage.name}; start="{self.start}" {verb}'
        needs = self.rank_at(site) * (2 if self.start == "lora_ga" else 1)
        has = min(site.fan_in, site.fan_out)
        return f'start="{self.start}" takes {needs} directions of its weight, which has {has}' if needs > has else None

    def rank_at(self, site: Site) -> int:
        """R at this site."""
        return last_match(self.rank_pattern, site, self.rank)

    def scale_at(self, site: Site) -> float:
        """s at this site."""
        return last_match(self.alpha_pattern, site, self.alpha) / self._per(self.rank_at(site))

    def _per(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilised else rank

    def choose(self, model: nn.Module, loss: Callable[[], Tensor], batches: int = 8) -> "LoRA":
        """The method with the start that it finds on data, to be attached.  The model stays as it was.

        loss: gives the task's loss on the next batch; called `batches` times, in eval mode.
        EVA gives every site a rank of its own, and leaves out those that get none; s stays what it was.
        Raises ConfigError, TargetError, or NonFiniteError if an input or a gradient is not finite.
        """
        from ..core import data_starts  # here: few starts need it

        require(self.start in OF_DATA, f'start="{self.start}" needs no data: attach the method as it is')
        sites = self.resolve(model).sites
        ranks, scales = {s.name: self.rank_at(s) for s in sites}, {s.name: self.scale_at(s) for s in sites}
        found = data_starts.found(self.start, model, sites, ranks, scales, loss, batches)
        chosen = replace(self)
        if self.start == "eva":
            names = sorted(found, key=lambda name: name.count("."))  # "a.b" is also the end of "c.a.b": the last counts
            own = {name: len(found[name][0]) for name in names}
            chosen = replace(
                self,
                targets=Targets.exactly(site.path for site in sites if site.name in found),
                rank_pattern=own,
                alpha_pattern={name: scales[name] * self._per(rank) for name, rank in own.items()},
            )
        object.__setattr__(chosen, "chosen", found)
        return chosen

    def fitted(self, model: nn.Module) -> Method:
        require(
            self.start not in OF_DATA or bool(self.chosen),
            f'start="{self.start}" is found on data: attach(model, method.choose(model, loss))',
        )
        return self

    @property
    def told_by_tensors(self) -> bool:
        return self.start in SUBTRACTED

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> "LoRA":
        """While a folder is read: HF PEFT's own, of a start that is subtracted, has R rows of A; ours has 2 R."""
        found = [(named["A"], self.rank_at(site)) for site, named in tensors.items() if "A" in named]
        method = replace(self)
        same = bool(found) and all(A.is_meta and len(A) == rank for A, rank in found)
        object.__setattr__(method, "of_changed_base", same)
        return method

    def build(self, site: Site) -> "LoRAAdapter":
        return LoRAAdapter(self, site)


class LoRAAdapter(LowRankAdapter):
    """A and B at one site.  On stacked experts every expert has its own: A (E R, I), B (E O, R)."""

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor
    bias: Tensor | None

    def __init__(self, method: LoRA, site: Site) -> None:
        super().__init__(site, scale=method.scale_at(site), dropout=method.dropout, dropout_on=method.dropout_on)
        self.start, self.rank = method.start, method.rank_at(site)
        self.chosen, self.subtracts = method.chosen.get(site.name), method.start in SUBTRACTED
        stack = site.linear.stack
        self.A, B = site.empty(stack * self.rank, site.fan_in), site.empty(stack * site.fan_out, self.rank)
        if self.start == "mica":
            self.register_buffer("B", B.detach())
        else:
            self.B = B
        if self.subtracts:
            self.register_buffer("A0", torch.empty_like(self.A).detach())
            self.register_buffer("B0", torch.empty_like(B).detach())
        self.register_parameter("bias", site.empty(site.fan_out) if method.bias_on_B else None)
        if method.bias_on_B:
            self.plain = False  # the fused pass has no place for it
            self.mergeable = site.bias is not None  # type: ignore[misc]

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None) -> None:
        A, B = self._started(generator)
        self.A.copy_(A)
        self.B.copy_(B)
        if self.subtracts:
            self.A0.copy_(A)
            self.B0.copy_(B)
        if self.bias is not None:
            self.bias.zero_()

    def _started(self, generator: torch.Generator | None) -> Factors:
        if self.start in OF_DATA:
            require(self.chosen is not None, f"nothing was chosen at {self.site.name}: choose again, for this model")
            return cast(Factors, self.chosen)
        if self.start in DRAWN:
            return starts.drawn(self.start, self.site, self.A, self.B, generator)
        return starts.of_weight(self.start, self.site, self.rank, self.scale, generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.subtracts:
            return self.A, self.B
        A = beside(self.A, self.A - self.A0, self.site.linear.stack)
        return A, torch.cat([self.B - self.B0, self.B0], 1)

    @property
    def by_factors(self) -> bool:
        return self.bias is None and self.runs_as(LoRAAdapter)

    def delta(self, x: Tensor) -> Tensor:
        change = super().delta(x)
        return change if self.bias is None else change + self.site.channels(self.scale * self.bias, change)

    def bias_delta(self, rows: slice) -> Tensor | None:
        return None if self.bias is None else self.scale * self.bias[rows]


def beside(one: Tensor, other: Tensor, stack: int) -> Tensor:
    """Two A (E R, I) of a stack of E experts as one (E 2 R, I)."""
    I = one.shape[1]
    return torch.cat([one.view(stack, -1, I), other.view(stack, -1, I)], 1).flatten(0, 1)
