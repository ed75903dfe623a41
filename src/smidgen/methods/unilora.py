"""Uni-LoRA: make all of LoRA's matrices of one short vector.  Li et al. 2025, arXiv:2506.00799.

    W' = W + B A        every entry of every A and B is t[k] / sqrt(n_k), for a k drawn once from `seed`

t: (d,), shared by all sites.   n_k: how many entries have this k; all nearly as many, so that the map from t to the
sum of R (I + O) entries keeps lengths.   A: (R, I)   B: (O, R)   A t of zeros could not learn, so the start is near
the base model and not at it.   Trainable parameters: d in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import MissingDependency
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, Shared, method
from ..core.site import Site


@method("unilora")
@dataclass(frozen=True, kw_only=True)
class UniLoRA(Method):
    """LoRA from one vector.

    rank: R.   length: d.   dropout: probability of dropping an entry of the adapter's input while training.
    bound: t starts uniform within it.   seed: of the places.
    save_indices: write the places and 1 / sqrt(n_k) of each as well, many times the size of t; else whoever reads the
    folder draws them again from the seed.   Drawing needs numpy, as HF PEFT's places are of its generator.
    """

    rank: int = 4
    length: int = 256
    dropout: float = 0.0
    bound: float = 0.02
    seed: int = 42
    save_indices: bool = False

    summary = "W' = W + B A, all entries of A and B from one shared vector"
    paper = "Li et al. 2025, arXiv:2506.00799"
    disk = DiskNames(
        "UNILORA",
        fields={
            "rank": "r",
            "length": "theta_d_length",
            "dropout": "unilora_dropout",
            "bound": "init_theta_d_bound",
            "seed": "proj_seed",
        },
        tensors={
            "indices_A": "unilora_indices_A",
            "indices_B": "unilora_indices_B",
            "scales_A": "unilora_scales_A",
            "scales_B": "unilora_scales_B",
            "shared.vector": "unilora_theta_d",
        },
    )

    def check(self) -> None:
        require_whole(self, "rank", "length")
        require_share(self, "dropout")

    def shared(self, sites: tuple[Site, ...]) -> "OneVector":
        return OneVector(self, sites)

    def build(self, site: Site) -> "UniLoRAAdapter":
        return UniLoRAAdapter(self, site)


class OneVector(Shared):
    """t (d,), and until every adapter has taken its part: the places in t of all entries, and 1 / sqrt(n_k) of each."""

    def __init__(self, method: UniLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        self.bound, self.seed = method.bound, method.seed
        self.vector = sites[0].empty(method.length)
        stacks = {site.name: (method.rank * site.linear.stack, site) for site in sites}
        self.sizes = {name: (rows * site.fan_in, rows * site.fan_out) for name, (rows, site) in stacks.items()}
        self.drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self) -> None:
        sizes = [A + B for A, B in self.sizes.values()]
        places = _places(sum(sizes), len(self.vector), self.seed)
        n = torch.bincount(places, minlength=len(self.vector))
        scales = n[places].double().rsqrt()
        parts = zip(torch.split(places, sizes), torch.split(scales, sizes), strict=True)
        self.drawn = dict(zip(self.sizes, parts, strict=True))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.uniform_(self.vector, -self.bound, self.bound, generator=generator)


def _places(total: int, length: int, seed: int) -> Tensor:
    """`total` places in a vector, each as often as the others or once more, shuffled: (total,) long."""
    try:
        import numpy
    except ImportError as error:
        raise MissingDependency('Uni-LoRA\'s places are drawn with numpy: pip install "smidgen[text]"') from error
    generator = numpy.random.default_rng(seed)
    often, more = divmod(total, length)
    even = numpy.repeat(numpy.arange(length), often)
    extra = generator.choice(length, size=more, replace=False) if more else even[:0]
    places = numpy.concatenate([even, extra])
    generator.shuffle(places)
    return torch.from_numpy(places).long()


class UniLoRAAdapter(LowRankAdapter):
    """Places in t and scales of the entries of A (R, I) and B (O, R) at one site; of experts (E R, I), (E O, R)."""

    starts_as_base = False
    shared: OneVector
    indices_A: Tensor
    indices_B: Tensor
    scales_A: Tensor
    scales_B: Tensor

    def __init__(self, method: UniLoRA, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        stack = site.linear.stack
        for name, shape in {"A": (stack * method.rank, site.fan_in), "B": (stack * site.fan_out, method.rank)}.items():
            like = site.empty(*shape).detach()
            self.register_buffer(f"scales_{name}", like, persistent=method.save_indices)
            self.register_buffer(f"indices_{name}", torch.empty_like(like).long(), persistent=method.save_indices)

    def prepare(self) -> None:
        places, scales = self.shared.drawn.pop(self.site.name)
        of_A = self.indices_A.numel()
        for name, part in {"A": slice(of_A), "B": slice(of_A, None)}.items():
            like = getattr(self, f"scales_{name}")
            setattr(self, f"indices_{name}", places[part].view(like.shape).to(like.device, copy=True))
            setattr(self, f"scales_{name}", scales[part].view(like.shape).to(like, copy=True))

    def factors(self) -> tuple[Tensor, Tensor]:
        vector = self.shared.vector.to(self.scales_A.device)
        A = vector.index_select(0, self.indices_A.flatten()).view(self.scales_A.shape) * self.scales_A
        B = vector.index_select(0, self.indices_B.flatten()).view(self.scales_B.shape) * self.scales_B
        return A, B
