"""WaveFT: learn a few wavelet coefficients of a weight change.  Bilican et al. 2025, arXiv:2505.12532.

    W' = W + s F^-1(S)          S[p_k, q_k] = c_k, zero elsewhere          F^-1: one step of the inverse 2-D transform
       = W + s sum_k c_k a_k b_k^T          a_k, b_k: filters of length L at a place that follows from p_k and q_k

S: (O, I), its four quarters being the bands of the transform   c: (n,)   p, q: n places, drawn once from `seed`.
s: the scale.   c starts at zero, so training starts from the base model.   Trainable parameters: n per site.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.disk_names import DiskNames
from ..core.errors import require
from ..core.full_weight import Gradients, Pullback
from ..core.method import Method, method
from ..core.site import Site
from ..core.sparse import cost_less, few_of_product
from ..core.wavelets import FAMILIES, filters
from .fourierft import FourierFT, SpectrumAdapter


@method("waveft")
@dataclass(frozen=True, kw_only=True)
class WaveFT(FourierFT):
    """Few coefficients of a wavelet transform.

    frequencies: n, at every site.   proportional: n on average, and at each site as its share of all weights.
    wavelet: db1 (Haar) to db10, sym2 to sym10, coif1 to coif3.   use_idwt: False: c are entries of the change itself.
    """

    frequencies: int = 2592
    scale: float = 25.0
    wavelet: str = "db1"
    use_idwt: bool = True
    proportional: bool = False

    summary = "W' = W + s F^-1(S), S sparse, F a wavelet transform"
    paper = "Bilican et al. 2025, arXiv:2505.12532"
    disk = DiskNames(
        "WAVEFT",
        fields={
            "frequencies": "n_frequency",
            "scale": "scaling",
            "seed": "random_loc_seed",
            "wavelet": "wavelet_family",
            "frequencies_pattern": "n_frequency_pattern",
        },
        tensors={"spectrum": "waveft_spectrum"},
        ignored=("proportional_parameters",),  # how many there are is in the file
    )

    def check(self) -> None:
        super().check()
        require(
            self.wavelet in FAMILIES, f'there is no wavelet "{self.wavelet}" here. There are: {", ".join(FAMILIES)}'
        )

    def fitted(self, model: nn.Module) -> Method:
        if not self.proportional:
            return self
        sites = self.resolve(model).sites
        mean = sum(site.fan_out * site.fan_in for site in sites) / len(sites)
        shares = {site.name: max(1, round(self.frequencies * site.fan_out * site.fan_in / mean)) for site in sites}
        return replace(self, proportional=False, frequencies_pattern=shares)

    def build(self, site: Site) -> "WaveFTAdapter":
        return WaveFTAdapter(self, site)


class WaveFTAdapter(SpectrumAdapter):
    """c at one site.  Coefficient k adds c_k times a wavelet, the product of two filters: L rows by L columns."""

    rows: Tensor
    columns: Tensor
    row_filters: Tensor
    column_filters: Tensor

    def __init__(self, method: WaveFT, site: Site) -> None:
        super().__init__(method, site)
        self.wavelet = method.wavelet if method.use_idwt else None
        for name in ("rows", "columns"):
            self.register_buffer(name, torch.empty(len(self.spectrum), 1, dtype=torch.long), persistent=False)
            self.register_buffer(name[:-1] + "_filters", torch.empty(len(self.spectrum), 1), persistent=False)

    def prepare(self) -> None:
        super().prepare()
        O, I = self.shape
        p, q = self.places // I, self.places % I
        if self.wavelet is None:
            ones = torch.ones_like(self.spectrum)[:, None].detach()
            self.rows, self.columns, self.row_filters, self.column_filters = p[:, None], q[:, None], ones, ones
            return
        # the transform shortens each axis by L - 2: S is the middle of a larger, even spectrum, as in HF PEFT
        both = filters(self.wavelet).to(self.spectrum)
        lost = both.shape[1] - 2
        H, V = (size + lost + (size + lost) % 2 for size in (O, I))
        p, q = p + (H - O) // 2, q + (V - I) // 2
        # also as there: the right half is high along the rows' axis, the lower half along the columns'
        self.rows, self.row_filters = _taps(p % (H // 2), both[(q >= V // 2).long()], O, H - lost)
        self.columns, self.column_filters = _taps(q % (V // 2), both[(p >= H // 2).long()], I, V - lost)

    def weight_delta(self, rows: slice) -> Tensor:
        O, I = self.shape
        entries = self.spectrum[:, None, None] * self._wavelets()
        return self.spectrum.new_zeros(O * I).index_add(0, self._entries(), entries.flatten()).view(O, I)[rows]

    @torch.no_grad()
    def changed(self, W: Tensor | None, rows: slice) -> tuple[Tensor, Pullback]:
        c, places, wavelets = self.spectrum, self._entries(), self._wavelets()
        V = c.new_zeros(self.shape) if W is None else W.clone(memory_format=torch.contiguous_format)
        V.view(-1).index_add_(0, places, (c[:, None, None] * wavelets).flatten())

        def back(dD: Tensor, gradients: Gradients) -> None:
            self._add(dD.reshape(-1).index_select(0, places), gradients)

        return V, back

    def pull(self, back: Pullback, dy: Tensor, x: Tensor, dtype: torch.dtype, gradients: Gradients) -> None:
        if cost_less(self.row_filters.shape[1] ** 2 * len(self.spectrum), self.shape, dy, self.spectrum):
            self._add(few_of_product(dy, x, self._entries()), gradients)
        else:
            super().pull(back, dy, x, dtype, gradients)

    def _add(self, dD: Tensor, gradients: Gradients) -> None:
        """Add c's gradient, of dD at the wavelets' entries (n L L,)."""
        wavelets = self._wavelets()
        gradients[self.spectrum].add_((dD.view_as(wavelets) * wavelets).sum((1, 2)))

    def _entries(self) -> Tensor:
        """Where the wavelets are in W: (n L L,), flat."""
        return (self.rows[:, :, None] * self.shape[1] + self.columns[:, None]).flatten()

    def _wavelets(self) -> Tensor:
        """s a_k b_k^T: (n, L, L)."""
        return self.scale * self.row_filters[:, :, None] * self.column_filters[:, None]


def _taps(k: Tensor, filters: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Where along an axis the filters (n, L) of the coefficients k (n,) of a band act: (n, L), and how much there.

    The transform gives `length` entries, of which the middle `size` are the weight's; what falls outside is zero.
    """
    L = filters.shape[1]
    places = 2 * k[:, None] + torch.arange(L, device=k.device) - (L - 2) - (length - size) // 2
    inside = (places >= 0) & (places < size)
    return places.where(inside, 0), filters * inside
