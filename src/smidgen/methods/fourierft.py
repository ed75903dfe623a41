"""FourierFT: learn a few coefficients of a weight change's spectrum.  Gao et al. 2024, arXiv:2405.03003, equations 2-4.

    W' = W + s Re(F^-1(S))          S[p_k, q_k] = c_k, zero elsewhere          F^-1: the inverse 2-D Fourier transform

S: (O, I)   c: (n,)   p, q: n places of the spectrum, drawn once from `seed`.   s: the scale.
c starts at zero, so training starts from the base model (the authors draw it from N(0, 1), which does not).
Trainable parameters: n per site.

On linear layers D is never formed: D x is a transform of x, n products, and a transform back.  With x^[q] and y^[p] the
transforms' entries of half the places, which say all of real vectors,
    Re y^[p] += c Re x^[q]          Im y^[p] += c s Im x^[q]          for each place; s is 1 or -1
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import AdditiveAdapter, Call
from ..core.checks import require_whole
from ..core.disk_names import DiskNames
from ..core.full_weight import FullWeightAdapter
from ..core.layers import LinearKind
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
        require_whole(self, "frequencies")

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

    def build(self, site: Site) -> "SpectrumAdapter":
        return FourierFTAdapter(self, site)


class SpectrumAdapter(FullWeightAdapter):
    """c at one site, and its places."""

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
        generator, (O, I) = torch.Generator().manual_seed(self.seed), self.shape
        drawn = torch.randperm(O * I, generator=generator)[: len(self.spectrum)]
        self.places = drawn.to(self.spectrum.device)


class FourierFTAdapter(SpectrumAdapter):
    """c at one site."""

    def __init__(self, method: FourierFT, site: Site) -> None:
        super().__init__(method, site)
        O, I, n = *self.shape, len(self.spectrum)
        self.thin = isinstance(site.kind, LinearKind)
        if self.thin:
            self.forwards, self.backwards = _Paths(I, O, n), _Paths(O, I, n)

    def prepare(self) -> None:
        super().prepare()
        if self.thin:
            p, q = self.places // self.shape[1], self.places % self.shape[1]
            self.forwards.prepare(q, p)
            self.backwards.prepare(p, q)

    def forward(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.thin:
            return AdditiveAdapter.forward(self, call, x, *args, **kwargs)
        return super().forward(call, x, *args, **kwargs)

    def delta(self, x: Tensor) -> Tensor:
        if not self.thin:
            return super().delta(x)
        rows, c = x.reshape(-1, x.shape[-1]).to(self.spectrum.dtype), self.spectrum  # transforms want 32 bits
        scale = self.scale / (self.shape[0] * self.shape[1])
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides itself what to keep
            y: Tensor = self.forwards(rows, c * scale)
        else:
            y = _Spectral.apply(rows, c * scale, self.forwards, self.backwards)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

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


class _Paths(nn.Module):
    """The way from vectors of `start` numbers to vectors of `end`, through n places of the spectrum.

    Real and imaginary parts stand one below the other, so there are 2 n products of two numbers.
    """

    sources: Tensor  # (2n,), of the products: entries of x^
    first: Tensor  # (entries of y^,): each one's first product
    order: Tensor  # (2n,): the numbers of c
    weights: Tensor  # (2n,): what these are multiplied by

    def __init__(self, start: int, end: int, n: int) -> None:
        super().__init__()
        self.start, self.end = start, end
        for name, size in {"sources": 2 * n, "first": 2 * (end // 2 + 1), "order": 2 * n}.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.long), persistent=False)
        self.register_buffer("weights", torch.empty(2 * n), persistent=False)

    def prepare(self, starts: Tensor, ends: Tensor) -> None:
        """Compute all of them from the places' two indices."""
        (source, one), (goal, other) = _half(starts, self.start), _half(ends, self.end)
        sources, goals = (torch.cat([k, k + size // 2 + 1]) for k, size in ((source, self.start), (goal, self.end)))
        goals, order = goals.sort(stable=True)
        inner = (goal > 0) & (2 * goal != self.end)  # the transform back counts those twice, and of others Im is zero
        real = torch.where(inner, 0.5, 1.0)
        weights = torch.cat([real, torch.where(inner, -0.5, 0.0) * one * other])
        self.sources, self.order, self.weights = sources[order], order % len(starts), weights[order] * self.end
        self.first = torch.searchsorted(goals, torch.arange(len(self.first), device=goals.device))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N, start) to (N, end)."""
        y = self.summed(_parts(x), c).view(2, -1, len(x)).permute(2, 1, 0).contiguous()
        back: Tensor = torch.fft.irfft(torch.view_as_complex(y), n=self.end)
        return back

    def summed(self, x: Tensor, c: Tensor) -> Tensor:
        """The products added up, of the parts of x."""
        weights = c[self.order] * self.weights.to(c.dtype)
        return F.embedding_bag(self.sources, x, self.first, mode="sum", per_sample_weights=weights)


class _Spectral(torch.autograd.Function):
    """Keeps x alone, which what reads it keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, forwards: _Paths, backwards: _Paths) -> Any:
        ctx.save_for_backward(x, c)
        ctx.paths = forwards, backwards
        return forwards(x, c)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, c), (forwards, backwards) = ctx.saved_tensors, ctx.paths
        dx = dc = None
        if ctx.needs_input_grad[0]:
            dx = backwards(dy, c)
        if ctx.needs_input_grad[1]:
            dy_parts = _parts(dy) / forwards.end
            dy_parts.view(2, -1, len(dy))[:, 1 : (forwards.end + 1) // 2] *= 2
            with torch.enable_grad():
                c = c.detach().requires_grad_()
                (dc,) = torch.autograd.grad(forwards.summed(_parts(x), c), c, dy_parts)
        return dx, dc, None, None


def _half(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where in half a spectrum these places are, and the sign of the imaginary part there."""
    is_mirrored = 2 * places > size
    return torch.where(is_mirrored, size - places, places), torch.where(is_mirrored, 1.0, -1.0)


def _parts(x: Tensor) -> Tensor:
    """The half spectrum of rows x (N, size), real above imaginary parts: (2 (size // 2 + 1), N)."""
    transformed = torch.view_as_real(torch.fft.rfft(x))
    return transformed.permute(2, 1, 0).reshape(-1, len(x))
