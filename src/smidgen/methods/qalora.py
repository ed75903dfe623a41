"""QA-LoRA: one column of A for each group of input channels.  Xu et al. 2023, arXiv:2309.14717, algorithm 1.

    y' = y + s B A P x          W' = W + s B A P          P x: the sums over groups of G neighbours

A: (R, I / G)   B: (O, R)   P: (I / G, I) of zeros and ones   s = alpha / R.   All columns of a group change alike, so
that on a weight quantised in groups of G columns the change can join the groups' zero points and the weight stays
quantised.   B starts at zero, so training starts from the base model.   Trainable parameters: R (I / G + O) per site.
"""

from dataclasses import dataclass

from torch import Tensor

from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.layers import ConvKind, EmbeddingKind
from ..core.method import method
from ..core.site import Site
from .lora import DRAWN, LoRA, LoRAAdapter


@method("qalora")
@dataclass(frozen=True, kw_only=True)
class QALoRA(LoRA):
    """LoRA's settings, with its random starts.

    group_size: G; that of the quantised weight, where it is to be merged into one.
    """

    group_size: int = 16

    summary = "W' = W + s B A P, P sums groups"
    paper = "Xu et al. 2023, arXiv:2309.14717"
    known_starts = DRAWN
    disk = DiskNames(
        "LORA",
        fields={**LoRA.disk.fields, "group_size": "qalora_group_size"},
        tensors=LoRA.disk.tensors,
        fixed={"use_qalora": True},
    )

    def check(self) -> None:
        super().check()
        require_whole(self, "group_size")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if isinstance(site.kind, ConvKind | EmbeddingKind):
            return f"QA-LoRA groups the input channels of linear layers, and this is a {site.linear.name}"
        if site.fan_in % self.group_size:
            return f"its {site.fan_in} input channels do not make groups of {self.group_size}"
        return None

    def build(self, site: Site) -> "QALoRAAdapter":
        return QALoRAAdapter(self, site)


class QALoRAAdapter(LoRAAdapter):
    """A and B at one site."""

    def __init__(self, method: QALoRA, site: Site) -> None:
        super().__init__(method, site)
        self.group_size = method.group_size
        self.A = site.empty(self.A.shape[0], site.fan_in // self.group_size)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.repeat_interleave(self.group_size, 1), self.B  # A P: (R, I)
