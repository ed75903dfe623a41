"""MonteCLoRA: a LoRA whose A is the average of weighted random samples around itself while it trains.  Sengupta et al.
2024, arXiv:2411.04358, section 4.

    training    W' = W + s B (A + a diag(exp(t) sqrt(w)) sum_n p_n E_n)
    after       W' = W + s B A
    p = softmax(u - mean(u) + sqrt(v) z)        v_n = (1 - 2 / N) exp(-u_n) + sum_m exp(-u_m) / N^2

A: (R, I)   B: (O, R)   s = alpha / R   a: sample_scale   t: (R,) log standard deviations   u: (N,) log weights of the N
samples.   Drawn in every call: E_n (R, I) and z (N,) standard normal, and w (R,) chi-squared with R degrees of freedom,
the diagonal of a Wishart matrix.   B starts at zero, so training starts from the base model.
Trainable parameters: R (I + O + 1) + N per site; t and u serve training alone.

The penalty is the mean over sites of kl_weight times the divergences of p, w and E from their priors, and, with
`entropy`, of |p|^2:   KL(Dirichlet(exp u) | Dirichlet(c)) + R d(exp 2t) + N d(w exp 2t),   2 d(x) = sum(x - log x - 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.checks import require_above_zero, require_whole
from ..core.disk_names import DiskNames
from ..core.method import method
from ..core.site import Site
from .lora import DRAWN, LoRA, LoRAAdapter

_LEAST_VARIANCE, _LEAST_LOGIT_VARIANCE = 1e-3, 1e-6  # the authors'


@method("monteclora")
@dataclass(frozen=True, kw_only=True)
class MonteCLoRA(LoRA):
    """LoRA's settings, with its random starts.

    samples: N.   sample_scale: a.   kl_weight: of the divergences in the penalty.   dirichlet_prior: c.
    entropy: penalise weights of samples that are all on one.
    """

    samples: int = 8
    sample_scale: float = 1e-4
    kl_weight: float = 1e-5
    dirichlet_prior: float = 0.1
    entropy: bool = False

    summary = "W' = W + s B A, A averaged over samples in training"
    paper = "Sengupta et al. 2024, arXiv:2411.04358"
    known_starts = DRAWN
    on_linear_calls = True
    disk = DiskNames(
        "LORA",
        fields=LoRA.disk.fields,
        tensors={
            **LoRA.disk.tensors,
            "t": "lora_monteclora_sampler.std_prior",
            "u": "lora_monteclora_sampler.expert_weights_prior",
            "p": "lora_monteclora_sampler.expert_weights",
            "variance": "lora_monteclora_sampler.gaussian_var_prior",
        },
        fixed={"monteclora_config": ...},
    )

    def check(self) -> None:
        super().check()
        require_whole(self, "samples")
        require_above_zero(self, "dirichlet_prior")

    def build(self, site: Site) -> "MonteCLoRAAdapter":
        return MonteCLoRAAdapter(self, site)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        parts = [part for part in adapters.values() if isinstance(part, MonteCLoRAAdapter)]
        if not parts or not (self.kl_weight or self.entropy):
            return None
        return torch.stack([part.penalty(self) for part in parts]).mean()


class MonteCLoRAAdapter(LoRAAdapter):
    """A, B, t and u at one site, and p and the variances of the last call."""

    p: Tensor
    variance: Tensor
    w: Tensor
    z: Tensor

    def __init__(self, method: MonteCLoRA, site: Site) -> None:
        super().__init__(method, site)
        self.sample_scale = method.sample_scale
        R, N = self.rank, method.samples
        self.t, self.u = site.empty(R), site.empty(N)
        self.register_buffer("p", site.empty(N).detach())
        self.register_buffer("variance", site.empty(R).detach())
        self.register_buffer("w", torch.empty_like(self.variance), persistent=False)
        self.register_buffer("z", torch.empty_like(self.p), persistent=False)

    def prepare(self) -> None:
        super().prepare()
        self.w.fill_(1)
        self.z.zero_()

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        for learned in (self.t, self.u):
            nn.init.uniform_(learned, generator=generator)  # the authors' start
        nn.init.constant_(self.p, 1 / len(self.p))
        nn.init.ones_(self.variance)

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.training:
            return self._sampled(), self.B
        if torch.is_grad_enabled():  # t and u have a gradient here too, of zero
            return self.A + 0 * (self.t.sum() + self.u.sum()), self.B
        return self.A, self.B

    def weight_delta(self, rows: slice) -> Tensor:
        return (self.scale * self.B[rows]) @ self.A

    def _sampled(self) -> Tensor:
        """A (R, I) with this call's samples."""
        E = self._draw()
        variance, p = self._variance(), self._weights()
        with torch.no_grad():
            self.variance.copy_(variance)
            self.p.copy_(p)
        mean = (p[:, None, None] * E).sum(0)  # (R, I)
        return self.A + self.sample_scale * variance.sqrt()[:, None] * mean

    @torch.no_grad()
    def _draw(self) -> Tensor:
        """E (N, R, I); w and z are kept for the penalty."""
        R, N = self.rank, len(self.u)
        self.w.copy_(torch.randn(R, R, dtype=self.w.dtype, device=self.w.device).square().sum(0))
        self.z.normal_()
        return torch.randn(N, *self.A.shape, dtype=self.A.dtype, device=self.A.device)

    def _variance(self) -> Tensor:
        return ((2 * self.t).exp() * self.w).clamp_min(_LEAST_VARIANCE)

    def _weights(self) -> Tensor:
        N, inverse = len(self.u), (-self.u).exp()
        v = (inverse * (1 - 2 / N) + inverse.sum() / N**2).clamp_min(_LEAST_LOGIT_VARIANCE) + _LEAST_LOGIT_VARIANCE
        return torch.softmax(v.sqrt() * self.z + self.u - self.u.mean(), 0)

    def penalty(self, method: MonteCLoRA) -> Tensor:
        """The divergences and |p|^2 of the last call, weighed."""
        concentration, prior = self.u.exp(), torch.full_like(self.u, method.dirichlet_prior)
        of_p = _dirichlet_divergence(concentration, prior)
        of_w = self.rank * _divergence((2 * self.t).exp())
        of_E = len(self.u) * _divergence(self._variance())
        entropy = self._weights().square().sum() if method.entropy else 0
        return method.kl_weight * (of_p + of_w + of_E) + entropy


def _divergence(x: Tensor) -> Tensor:
    return 0.5 * (x - x.log() - 1).sum()


def _dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(Dirichlet(a) | Dirichlet(b))."""
    normaliser = (torch.lgamma(a.sum()) - torch.lgamma(a).sum()) - (torch.lgamma(b.sum()) - torch.lgamma(b).sum())
    return normaliser + ((a - b) * (torch.digamma(a) - torch.digamma(a.sum()))).sum()
