"""VB-LoRA: make all of LoRA's matrices of a few shared vectors.  Li et al. 2024, arXiv:2405.15179.

    W' = W + B A        each piece of A and B = sum over the K best j of softmax(logits)_j * bank_j

bank: (n, V), shared by all sites.   A: (R, I), whose rows are in I / V pieces   B: (O, R), whose columns are in O / V.
Each piece has n logits, and the softmax is over the K largest.   A bank of zeros could not learn, so the start is near
the base model and not at it.   Trainable parameters: n V once, and R n (I + O) / V per site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.checks import require_share, require_whole
from ..core.disk_names import DiskNames
from ..core.errors import ConfigError, FolderError, require
from ..core.low_rank import LowRankAdapter
from ..core.method import Method, Shared, method
from ..core.site import Site


@method("vblora")
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """LoRA from a bank of vectors.

    rank: R.   vectors: n.   vector_length: V; fan-in and fan-out of every site are multiples of it.   top_k: K.
    dropout: probability of dropping an entry of the adapter's input while training.
    bank_bound: the bank starts uniform within it.   logits_std: of the logits' start.
    top_k_only: of an adapter read from a folder that keeps the K best of each piece and no logits: it runs and merges,
    and cannot be trained.
    """

    rank: int = 4
    vectors: int = 256
    vector_length: int = 256
    top_k: int = 2
    dropout: float = 0.0
    bank_bound: float = 0.02
    logits_std: float = 0.1
    top_k_only: bool = False

    summary = "W' = W + B A, pieces of A and B mixed from a shared bank of vectors"
    paper = "Li et al. 2024, arXiv:2405.15179"
    on_stacks = False
    disk = DiskNames(
        "VBLORA",
        fields={
            "rank": "r",
            "vectors": "num_vectors",
            "top_k": "topk",
            "dropout": "vblora_dropout",
            "bank_bound": "init_vector_bank_bound",
            "logits_std": "init_logits_std",
            "top_k_only": "save_only_topk_weights",
        },
        tensors={
            "logits_A": "vblora_logits_A",
            "logits_B": "vblora_logits_B",
            "places_A": "vblora_logits_A_topk_indices",
            "places_B": "vblora_logits_B_topk_indices",
            "weights_A": "vblora_logits_A_topk_weights",
            "weights_B": "vblora_logits_B_topk_weights",
            "shared.bank": "vblora_vector_bank",
        },
    )

    def check(self) -> None:
        require_whole(self, "rank", "vectors", "vector_length", "top_k")
        require_share(self, "dropout")
        require(self.top_k <= self.vectors, f"top_k is {self.top_k}, of {self.vectors} vectors")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if site.fan_in % self.vector_length or site.fan_out % self.vector_length:
            return (
                f"its fan-in {site.fan_in} and fan-out {site.fan_out} are not both multiples of "
                f"vector_length = {self.vector_length}"
            )
        return None

    def with_tensors(self, tensors: Mapping[Site, Mapping[str, Tensor]]) -> "VBLoRA":
        for site, named in tensors.items():
            for places in (named[name] for name in ("places_A", "places_B") if name in named):
                inside = places.is_meta or (places.min() >= 0 and places.max() < self.vectors)
                require(bool(inside), f"{site.name} names vectors beyond the {self.vectors} of the bank", FolderError)
        return self

    def shared(self, sites: tuple[Site, ...]) -> "VectorBank":
        return VectorBank(self, sites)

    def build(self, site: Site) -> "VBLoRAAdapter":
        return VBLoRATopKAdapter(self, site) if self.top_k_only else VBLoRATrainedAdapter(self, site)


class VectorBank(Shared):
    """bank (n, V)."""

    def __init__(self, method: VBLoRA, sites: Sequence[Site]) -> None:
        super().__init__()
        self.bound = method.bank_bound
        self.bank = sites[0].empty(method.vectors, method.vector_length)
        self.bank.requires_grad_(not method.top_k_only)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.uniform_(self.bank, -self.bound, self.bound, generator=generator)


class VBLoRAAdapter(LowRankAdapter):
    """What both kinds share: A and B from places in the bank and weights, (pieces ..., K) each."""

    starts_as_base = False
    shared: VectorBank

    def __init__(self, method: VBLoRA, site: Site) -> None:
        super().__init__(site, dropout=method.dropout)
        self.top_k = method.top_k
        self.shapes = {  # of pieces
            "A": (method.rank, site.fan_in // method.vector_length),
            "B": (site.fan_out // method.vector_length, method.rank),
        }

    def mixture(self, name: str) -> tuple[Tensor, Tensor]:
        """Places in the bank, and weights, both (*pieces, K), for "A" or "B"."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self._matrix("A"), self._matrix("B")  # (R, I/V, V), (O/V, R, V)
        return A.flatten(1), B.transpose(1, 2).flatten(0, 1)

    def _matrix(self, name: str) -> Tensor:
        places, weights = self.mixture(name)
        bank = self.shared.bank.to(weights.device)
        mixed = nn.functional.embedding_bag(
            places.flatten(0, -2), bank, per_sample_weights=weights.flatten(0, -2), mode="sum"
        )
        return mixed.view(*self.shapes[name], -1)


class VBLoRATrainedAdapter(VBLoRAAdapter):
    """Logits (*pieces, n) for A and for B at one site."""

    def __init__(self, method: VBLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.std = method.logits_std
        self.logits_A, self.logits_B = (site.empty(*self.shapes[name], method.vectors) for name in "AB")

    def reset(self, generator: torch.Generator | None) -> None:
        for logits in (self.logits_A, self.logits_B):
            nn.init.normal_(logits, std=self.std, generator=generator)

    def mixture(self, name: str) -> tuple[Tensor, Tensor]:
        best, places = (self.logits_A if name == "A" else self.logits_B).topk(self.top_k, dim=-1)
        return places, best.softmax(-1)


class VBLoRATopKAdapter(VBLoRAAdapter):
    """Places (*pieces, K), and all weights but the last (*pieces, K - 1), which add up to 1 with it; nothing trains."""

    places_A: Tensor
    places_B: Tensor
    weights_A: Tensor
    weights_B: Tensor

    def __init__(self, method: VBLoRA, site: Site) -> None:
        super().__init__(method, site)
        few, some = method.vectors < 2**8, method.vectors < 2**15  # HF PEFT's choice
        whole = torch.uint8 if few else torch.int16 if some else torch.int32
        for name, shape in self.shapes.items():
            places = torch.empty(*shape, method.top_k, dtype=whole, device=site.stored.device)
            self.register_buffer(f"places_{name}", places)
            self.register_buffer(f"weights_{name}", site.empty(*shape, method.top_k - 1).detach())

    def reset(self, generator: torch.Generator | None) -> None:
        raise ConfigError("top_k_only is of adapters read from a folder: train one with top_k_only=False")

    def mixture(self, name: str) -> tuple[Tensor, Tensor]:
        places, weights = (self.places_A, self.weights_A) if name == "A" else (self.places_B, self.weights_B)
        return places.long(), torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
