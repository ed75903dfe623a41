"""The linear probe: what the frozen model can do already, and where the tuned head starts.

    outputs = W z + c      minimising  mean loss + penalty / 2 * |W S|^2,   S = diag(standard deviation of z)

Fitted by L-BFGS on standardised features; the penalty is chosen by cross-validation.  Alain & Bengio 2016, arXiv:1610.01644.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean loss

_PENALTIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_FOLDS = 3


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
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    folds = order.chunk(_FOLDS)
    penalties = _PENALTIES if len(z) >= 10 * _FOLDS else _PENALTIES[-1:]  # with a handful of rows: the strongest

    def held_out(penalty: float) -> float:
        total = 0.0
        for fold in folds:
            rest = torch.cat([other for other in folds if other is not fold])
            W, c = _fit(z[rest], targets[rest], outputs, loss, penalty)
            total += float(loss(z[fold] @ W.T + c, targets[fold])) * len(fold)
        return total

    penalty = min(penalties, key=held_out) if len(penalties) > 1 else penalties[0]
    W, c = _fit(z, targets, outputs, loss, penalty)
    weight = W / spread
    return Probe(weight, c - weight @ centre, penalty)


def _fit(z: Tensor, targets: Tensor, outputs: int, loss: Loss, penalty: float) -> tuple[Tensor, Tensor]:
    W = torch.zeros(outputs, z.shape[1], requires_grad=True)
    c = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, c], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(z @ W.T + c, targets) + penalty / 2 * W.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return W.detach(), c.detach()
