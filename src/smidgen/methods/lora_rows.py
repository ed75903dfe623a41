"""LoRA on some output channels of a layer: on q and v of a projection that holds q, k and v in one.
Hu et al. 2021, arXiv:2106.09685, section 4.2, as `MergedLinear` of the authors' code.

    W'[rows] = W[rows] + s B A          all other rows of W stay as they are, to the last bit          s = alpha / R

A: (R, I)   B: (N, R)   N = the number of rows, of O.   B starts at zero, so training starts from the base model.
Trainable parameters: R (I + N) per site.

    LoRARows()                                     q and v, in models whose layout core/fused_attention.py knows
    LoRARows(rows_pattern={"*.c_attn": ((0, 768), (1536, 2304))}, targets="*.c_attn")

All rows of a site share its A.  `MergedLinear` has an A for each of q, k, v: attach an adapter for each, in a Stack.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..core.errors import require
from ..core.fused_attention import Ranges, fused_projections
from ..core.method import method
from ..core.site import Site
from ..core.targets import Resolution, Targets, last_match
from .lora import DRAWN, LoRA, LoRAAdapter


@method("lora_rows")
@dataclass(frozen=True, kw_only=True)
class LoRARows(LoRA):
    """LoRA's settings with its random starts.

    rows_pattern: output channels, as ((start, stop), ...), of the sites that a glob matches; the last one counts.
    parts: which of "q", "k" and "v", where `rows_pattern` is empty: fills it in, and `targets` if nobody said them.
    """

    rows_pattern: Mapping[str, Ranges] = field(default_factory=dict)
    parts: str = "qv"

    summary = "W'[rows] = W[rows] + s B A, such as q of a packed projection"
    known_starts = DRAWN

    def check(self) -> None:
        super().check()
        frozen = {glob: tuple((start, stop) for start, stop in rows) for glob, rows in self.rows_pattern.items()}
        object.__setattr__(self, "rows_pattern", frozen)
        for glob, rows in frozen.items():
            bounds = [bound for pair in rows for bound in pair]
            whole = bool(rows) and all(isinstance(bound, int) for bound in bounds)
            ascending = whole and bounds == sorted(bounds) and all(start < stop for start, stop in rows)
            require(
                ascending and bounds[0] >= 0,
                f'rows_pattern of "{glob}" is {rows}; it is ((start, stop), ...), ascending, without overlap',
            )
        some = "".join(part for part in "qkv" if part in self.parts)
        require(sorted(self.parts) == sorted(some) != [], f'parts is "{self.parts}"; it is some of q, k and v, as "qv"')

    def fitted(self, model: nn.Module) -> "LoRARows":
        if self.rows_pattern:
            return self
        found = fused_projections(model, self.parts)
        targets = Targets.at(site for site, _ in found) if self.targets.is_auto else self.targets
        return replace(self, rows_pattern={site.name: ranges for site, ranges in found}, targets=targets)

    def resolve(self, model: nn.Module) -> Resolution:
        return super().resolve(model) if self.rows_pattern else self.fitted(model).resolve(model)

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        rows = last_match(self.rows_pattern, site, ())
        if not rows:
            return "rows_pattern says nothing of it"
        last = rows[-1][1]
        return f"rows_pattern goes up to {last}, and it has {site.fan_out} channels" if last > site.fan_out else None

    def rows_at(self, site: Site) -> list[int]:
        """The output channels that B has rows for."""
        return [row for start, stop in last_match(self.rows_pattern, site, ()) for row in range(start, stop)]

    def build(self, site: Site) -> "LoRARowsAdapter":
        return LoRARowsAdapter(self, site)


class LoRARowsAdapter(LoRAAdapter):
    """A (R, I), and B (N, R) of N rows, at one site.   On stacked experts: A (E R, I), B (E N, R)."""

    rows: Tensor

    def __init__(self, method: LoRARows, site: Site) -> None:
        super().__init__(method, site)
        self.chosen_rows = method.rows_at(site)
        self.B = site.empty(site.linear.stack * len(self.chosen_rows), self.rank)
        self.register_buffer("rows", torch.empty(0, dtype=torch.long, device=self.B.device), persistent=False)

    def prepare(self) -> None:
        self.rows = torch.tensor(self.chosen_rows, device=self.B.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, spread(self.B, self.rows, self.site)


def spread(B: Tensor, rows: Tensor, site: Site) -> Tensor:
    """B (E N, R) of some rows as that of all (E O, R), zero elsewhere; differentiable."""
    stack = site.linear.stack
    whole = B.new_zeros(stack, site.fan_out, B.shape[1])
    return whole.index_copy(1, rows, B.view(stack, -1, B.shape[1])).flatten(0, 1)
