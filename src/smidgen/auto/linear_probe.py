"""The linear probe: what the frozen model can do already, and where the tuned head starts.

    outputs = W z + c      minimising  mean loss + penalty / 2 * |W S|^2,   S = diag(standard deviation of z)

Fitted by L-BFGS on standardised features; the penalty that does best on a held-out fifth is used for all rows.
Alain & Bengio 2016, arXiv:1610.01644.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean loss

_PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # from strong to weak: each fit starts from the one before
_FEW = 30  # rows, below which nothing is held out and the strongest is taken


@dataclass(frozen=True)
class Probe:
    """W: (K, D), c: (K,), for features as the model gives them."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias


def fit_probe(features: Tensor, targets: Tensor, outputs: int, loss: Loss, *, seed: int) -> Probe:
    """Fit the probe on features (N, D) and targets (N, ...); K = outputs."""
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    z = (features - centre) / spread
    W, c = torch.zeros(outputs, z.shape[1]), torch.zeros(outputs)
    penalty = _PENALTIES[0]
    if len(z) >= _FEW:
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: len(z) // 5], order[len(z) // 5 :]
        best = math.inf
        for candidate in _PENALTIES:
            W, c = _fit(z[rest], targets[rest], W, c, loss, candidate)
            value = float(loss(z[held] @ W.T + c, targets[held]))
            if value >= best:
                break  # the path turns once
            best, penalty = value, candidate
    W, c = _fit(z, targets, W, c, loss, penalty)
    weight = W / spread
    return Probe(weight, c - weight @ centre, penalty)


def _fit(z: Tensor, targets: Tensor, W: Tensor, c: Tensor, loss: Loss, penalty: float) -> tuple[Tensor, Tensor]:
    W, c = W.clone().requires_grad_(), c.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([W, c], max_iter=50, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(z @ W.T + c, targets) + penalty / 2 * W.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return W.detach(), c.detach()
