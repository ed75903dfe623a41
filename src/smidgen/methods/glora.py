"""GLoRA: scale and shift a weight and a bias, entry by entry.  Chavan et al. 2023, arXiv:2306.07967.

    W' = W + W * A + B          b' = b + b * D + E + W c          *: entry by entry

A, B: (O, I), each a product of (O, R) and (R, I) ("lora"), a number for each output channel ("vector"), or one number
("constant").   c: (I,), likewise.   D, E: (O,) or one number.   Without a bias there is no c, D or E.
All start at zero, so training starts from the base model.   W and b are those of the base, also in a Stack.
Trainable parameters per site: of A and B 2 R (O + I), 2 O or 2; of c R (I + 1) or I; of D and E 2 O or 2.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adapter import Call
from ..core.checks import require_one_of, require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter, Gradients, Pullback
from ..core.method import Method, method
from ..core.site import Site

FORMS = {
    "A_B": ("lora", "vector", "constant", "none"),
    "C": ("lora", "vector", "none"),
    "D_E": ("vector", "constant", "none"),
}


@method("glora")
@dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """Scales and shifts of weight and bias.   rank: R.   A_B, C, D_E: the form of each; "none" leaves it out."""

    rank: int = 8
    A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    C: Literal["lora", "vector", "none"] = "lora"
    D_E: Literal["vector", "constant", "none"] = "constant"

    summary = "W' = W + W * A + B, b' = b + b * D + E + W c"
    paper = "Chavan et al. 2023, arXiv:2306.07967"
    reads_weight = True
    disk = DiskNames(
        "GLORA",
        fields={"rank": "r", "A_B": "config_A_B", "C": "config_C", "D_E": "config_D_E"},
        tensors={f"{letter}{part}": f"glora_{letter}.X{part}" for letter in "ABCDE" for part in ("d", "u", "")},
        kinds=("linear",),
    )

    def check(self) -> None:
        require_whole(self, "rank")
        for name, forms in FORMS.items():
            require_one_of(self, name, forms)

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if self.A_B == "none" and (site.bias is None or self.C == self.D_E == "none"):
            return "nothing would be trained: A and B are left out, and so are C, D and E, or it has no bias"
        return None

    def build(self, site: Site) -> "GLoRAAdapter":
        return GLoRAAdapter(self, site)


class GLoRAAdapter(FullWeightAdapter):
    """A to E at one site: Xd and Xu of those in "lora" form are called Ad and Au, the others A."""

    blockwise = True
    additive = False  # its bias comes after the fused product
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    E: Tensor
    Ad: Tensor
    Au: Tensor
    Bd: Tensor
    Bu: Tensor
    Cd: Tensor
    Cu: Tensor

    def __init__(self, method: GLoRA, site: Site) -> None:
        super().__init__(site)
        O, I, R = site.linear.stack * site.fan_out, site.fan_in, method.rank
        self.form, self.with_bias = method.A_B, site.bias is not None
        for letter in "AB":
            self._make(letter, method.A_B, R, (O, I), (O, 1))
        if self.with_bias:
            self._make("C", method.C, R, (I, 1), (I, 1))
            for letter in "DE":
                self._make(letter, method.D_E, R, (), (O,))

    def _make(self, letter: str, form: str, R: int, product: tuple[int, ...], vector: tuple[int, ...]) -> None:
        if form == "lora":
            self.register_parameter(f"{letter}d", self.site.empty(product[0], R))
            self.register_parameter(f"{letter}u", self.site.empty(R, product[1]))
        elif form != "none":
            self.register_parameter(letter, self.site.empty(*((1,) if form == "constant" else vector)))

    def reset(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("u"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.form == "lora":
            y = super().forward(call, x, *args, **kwargs)
        else:
            y = call(x, *args, **kwargs)
            if self.form != "none":
                y = self._scaled(x, y)
        return torch.add(y, self.site.channels(self.bias_delta(slice(None)), y)) if self.with_bias else y

    def _scaled(self, x: Tensor, y: Tensor) -> Tensor:
        """y with a number for each output channel as A and B: (y - b) a is added, and the sum of x times B."""
        b, O = self.site.bias, self.site.fan_out
        product = y if b is None else y - self.site.channels(b.detach().flatten(), y)
        ones = self.A.new_ones(1, self.site.fan_in)
        shift = self.site.expand(self.site.project(x, ones), self.B.view(-1, 1).expand(O, 1))
        return torch.addcmul(y, product, self.site.channels(self.A.view(-1).expand(O), y)) + shift.to(y.dtype)

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        Ad, Au, Bd, Bu = self.Ad[rows], self.Au, self.Bd[rows], self.Bu
        own = self.site.weight(rows).to(Ad.dtype)

        def back(dD: Tensor, gradients: Gradients) -> None:
            gradients[self.Bd][rows].addmm_(dD, Bu.T)
            gradients[Bu].addmm_(Bd.T, dD)
            dP = dD.mul_(own)
            gradients[self.Ad][rows].addmm_(dP, Au.T)
            gradients[Au].addmm_(Ad.T, dP)

        D = (Ad @ Au).mul_(own).addmm_(Bd, Bu)
        return D if W is None else D.add_(W), back

    def weight_delta(self, rows: slice) -> Tensor:
        W = self.site.weight(rows)
        return W * (self.Ad[rows] @ self.Au) + self.Bd[rows] @ self.Bu

    def bias_delta(self, rows: slice) -> Tensor:
        """b * D + E + W c of these rows: (rows,)."""
        W = self.site.weight(rows)
        parts = dict(self.named_parameters(recurse=False))
        assert self.site.bias is not None
        b = self.site.bias.detach().flatten()[rows]
        change = torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
        if "D" in parts:
            D, E = (p if len(p) == 1 else p[rows] for p in (self.D, self.E))
            change = b * D + E
        if "C" in parts or "Cd" in parts:
            c = self.C if "C" in parts else self.Cd @ self.Cu  # (I, 1)
            change = change + (W @ c.to(W.dtype)).view(-1)
        return change

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        change = None if b is None else self.bias_delta(rows).to(b.dtype)
        if self.form == "lora":
            W = W + self.weight_delta(rows).to(W.dtype)
        elif self.form != "none":
            A, B = ((p if len(p) == 1 else p[rows]).to(W.dtype) for p in (self.A, self.B))  # (rows, 1) or (1,)
            W = W + W * A + B
            if b is not None and self.site.bias is not None:  # as it runs: A scales what others of a Stack added to b
                b = b + (b - self.site.bias.detach().flatten()[rows].to(b.dtype)) * A.view(-1)
        return W, None if b is None or change is None else b + change
