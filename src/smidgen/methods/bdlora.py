"""BD-LoRA: LoRA with one factor block-diagonal, so that it is sharded as a tensor-parallel model is and needs no
communication of its own.  Wang et al. 2025, arXiv:2510.23346, section 3.

    W' = W + s B diag(A_1 .. A_n)          of layers sharded by input: attention's and the feed-forward's output
    W' = W + s diag(B_1 .. B_n) A          of layers sharded by output: all others

A_i: (R / n, I / n)   B: (O, R)      or      A: (R, I)   B_i: (O / n, R / n)      s = alpha / R.
The blocks are held one below the other: A (R, I / n), B (O, R / n).
B starts at zero, so training starts from the base model.
Trainable parameters: R (I / n + O), or R (I + O / n), per site.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.layers import ConvKind, EmbeddingKind
from ..core.method import method
from ..core.site import Site
from ..core.targets import Targets
from .lora import LoRA, LoRAAdapter

# layers that read what the layers before them were sharded into, as the field names them
_SHARDED_BY_INPUT = (
    *("o_proj", "out_proj", "out_lin", "attn.c_proj", "self_attention.dense", "SelfAttention.o", "EncDecAttention.o"),
    *("down_proj", "output.dense", "ffn_output", "lin2", "w2", "fc2", "linear2", "wo", "mlp.c_proj", "dense_4h_to_h"),
)


@method("bdlora")
@dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRA):
    """LoRA's settings, with its random starts.   At the same rank it has fewer parameters: take a larger one.

    blocks: n; the number of devices that will share the model, or a multiple.
    diagonal_A: globs on paths or their ends: the layers whose A is block-diagonal.   diagonal_B: of the others, those
        whose B is; what neither names has a plain LoRA.
    """

    blocks: int = 2
    diagonal_A: tuple[str, ...] = _SHARDED_BY_INPUT
    diagonal_B: tuple[str, ...] = ("*",)

    summary = "W' = W + s B A, A or B block-diagonal"
    paper = "Wang et al. 2025, arXiv:2510.23346"
    known_starts = ("kaiming", "gaussian")
    disk = DiskNames("LORA", fields=LoRA.disk.fields, tensors=LoRA.disk.tensors, fixed={"use_bdlora": ...})

    def __post_init__(self) -> None:
        for name in ("diagonal_A", "diagonal_B"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        super().__post_init__()

    def check(self) -> None:
        super().check()
        require_whole(self, "blocks")
        for rank in (self.rank, *self.rank_pattern.values()):
            require(rank % self.blocks == 0, f"rank is {rank}; it must be a multiple of blocks, {self.blocks}")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if isinstance(site.kind, ConvKind | EmbeddingKind):
            return f"BD-LoRA is for linear layers, and this is a {site.linear.name}"
        which = self.diagonal_at(site)
        width = {"A": site.fan_in, "B": site.fan_out}.get(which or "", 0)
        side = "input" if which == "A" else "output"
        return f"its {width} {side} channels do not make {self.blocks} blocks" if width % self.blocks else None

    def diagonal_at(self, site: Site) -> str | None:
        """Which factor is block-diagonal here: "A", "B" or None."""
        for name, globs in (("A", self.diagonal_A), ("B", self.diagonal_B)):
            if globs and Targets(*globs).matches(site.name, site.layer):
                return name
        return None

    def build(self, site: Site) -> "BDLoRAAdapter":
        return BDLoRAAdapter(self, site)


class BDLoRAAdapter(LoRAAdapter):
    """A and B at one site, the block-diagonal one as its blocks."""

    def __init__(self, method: BDLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.blocks, self.diagonal = method.blocks, method.diagonal_at(site)
        if self.diagonal == "A":
            self.A = site.empty(self.A.shape[0], site.fan_in // self.blocks)
        elif self.diagonal == "B":
            self.B = site.empty(self.B.shape[0], self.rank // self.blocks)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.A, self.B
        return self._whole(A) if self.diagonal == "A" else A, self._whole(B) if self.diagonal == "B" else B

    def _whole(self, M: Tensor) -> Tensor:
        """The blocks on the diagonal, zeros elsewhere, for each expert of a stack."""
        E, n = self.site.linear.stack, self.blocks
        blocks = M.view(E, n, -1, 1, M.shape[1])  # (E, n, rows, 1, columns)
        place = torch.eye(n, dtype=M.dtype, device=M.device).view(n, 1, n, 1)
        return (blocks * place).reshape(M.shape[0], -1)
