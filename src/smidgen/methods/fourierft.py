"""FourierFT: learn a few coefficients of a weight change's spectrum.  Gao et al. 2024, arXiv:2405.03003, equations 2-4.

    W' = W + s Re(F^-1(S))          S[p_k, q_k] = c_k, zero elsewhere          F^-1: the inverse 2-D Fourier transform

S: (O, I)   c: (n,)   p, q: n places of the spectrum, drawn once from `seed`.   s: the scale.
c starts at zero, so training starts from the base model (the authors draw it from N(0, 1), which does not).
Trainable parameters: n per site.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import FullWeightAdapter
from ..core.method import Method, method
from ..core.site import Site
from ..core.targets import last_match


@method("fourierft")
@dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """Few coefficients of a spectrum.

    frequencies: n, at every site.   scale: s; each coefficient moves an entry of W by at most s / (O I).
    seed: of the places, which are the same for sites of the same shape.
    frequencies_pattern: other numbers for the sites that a glob matches; the last one counts.
    """

    frequencies: int = 1000
    scale: float = 150.0
    seed: int = 777
    frequencies_pattern: Mapping[str, int] = field(default_factory=dict)

    summary = "W' = W + s Re(F^-1(S)), S sparse"
    paper = "Gao et al. 2024, arXiv:2405.03003"
    disk = DiskNames(
        "FOURIERFT",
        fields={
            "frequencies": "n_frequency",
            "scale": "scaling",
            "seed": "random_loc_seed",
            "frequencies_pattern": "n_frequency_pattern",
        },
        tensors={"spectrum": "fourierft_spectrum"},
    )

    def check(self) -> None:
        for count in (self.frequencies, *self.frequencies_pattern.values()):
            require(isinstance(count, int) and count > 0, f"frequencies is {count}; it is a whole number of at least 1")

    def accepts(self, site: Site) -> str | None:
        if reason := super().accepts(site):
            return reason
        if site.linear.stack > 1:
            return "a stack of matrices has no spectrum of its own here; FourierFT acts on single ones"
        return None

    def frequencies_at(self, site: Site) -> int:
        """n at this site: never more than the spectrum has entries."""
        n = last_match(self.frequencies_pattern, site, self.frequencies)
        return min(n, site.fan_out * site.fan_in)

    def build(self, site: Site) -> "FourierFTAdapter":
        return FourierFTAdapter(self, site)


class FourierFTAdapter(FullWeightAdapter):
    """c at one site."""

    in_blocks = False
    places: Tensor

    def __init__(self, method: FourierFT, site: Site) -> None:
        super().__init__(site)
        self.scale, self.seed = method.scale, method.seed
        self.shape = site.fan_out, site.fan_in
        self.spectrum = site.empty(method.frequencies_at(site))
        self.register_buffer("places", torch.empty(len(self.spectrum), dtype=torch.long), persistent=False)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.spectrum)

    def prepare(self) -> None:
        # HF PEFT's way of drawing them, so that its folders mean the same here
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(self.shape[0] * self.shape[1], generator=generator)[: len(self.spectrum)]
        self.places = drawn.to(self.spectrum.device)

    def weight_delta(self, rows: slice) -> Tensor:
        O, I = self.shape
        S = self.spectrum.new_zeros(O * I).index_add(0, self.places, self.spectrum).view(O, I)
        # the real part is the transform of the Hermitian part of S, and of that one half says all
        mirrored = S.roll((-1, -1), (0, 1)).flip(0, 1)  # S[-p, -q]
        half = (0.5 * (S + mirrored))[:, : I // 2 + 1]
        change: Tensor = torch.fft.irfft2(
            half.to(torch.complex64 if S.dtype == torch.float32 else torch.complex128), s=(O, I)
        )
        return self.scale * change[rows]
