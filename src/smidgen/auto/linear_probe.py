"""The linear probe: what the frozen model can do already, and where the tuned head starts.

    outputs = W z + c      minimising  mean loss + penalty / 2 * |W S|^2,   S = diag(standard deviation of z)

Where rows have weights, mean and deviation have them too: a row of weight 2 counts as two rows.  Fitted by L-BFGS on
standardised features; the penalty that does best on a held-out fifth is used for all rows.
Alain & Bengio 2016, arXiv:1610.01644.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (outputs, targets, weights of 1 on average) -> mean loss

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


def fit_probe(
    features: Tensor, targets: Tensor, outputs: int, loss: Loss, *, seed: int, weights: Tensor | None = None
) -> Probe:
    """Fit the probe on features (N, D) and targets (N, ...); K = outputs.   weights: (N,), at least 0."""
    shares = (
        torch.full((len(features), 1), 1 / len(features)) if weights is None else (weights / weights.sum())[:, None]
    )
    centre = (shares * features).sum(0)
    spread = (shares * (features - centre).square()).sum(0).sqrt().clamp_min(1e-6)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    z = features[order].sub_(centre).div_(spread)  # in this order once and for all: parts of it are then no copies
    targets, weights = targets[order], None if weights is None else weights[order]

    def mean_loss(W: Tensor, c: Tensor, rows: slice) -> Tensor:
        some = None if weights is None else weights[rows] / weights[rows].mean().clamp_min(1e-12)
        return loss(z[rows] @ W.T + c, targets[rows], some)

    W, c = torch.zeros(outputs, z.shape[1]), torch.zeros(outputs)
    penalty = _PENALTIES[0]
    if len(z) >= _FEW:
        held, rest = slice(len(z) // 5), slice(len(z) // 5, None)
        best = math.inf
        for candidate in _PENALTIES:
            W, c = _fit(partial(mean_loss, rows=rest), W, c, candidate)
            value = float(mean_loss(W, c, held))
            if value >= best:
                break  # the path turns once
            best, penalty = value, candidate
    W, c = _fit(partial(mean_loss, rows=slice(None)), W, c, penalty)
    weight = W / spread
    return Probe(weight, c - weight @ centre, penalty)


def _fit(mean_loss: Callable[[Tensor, Tensor], Tensor], W: Tensor, c: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    W, c = W.clone().requires_grad_(), c.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([W, c], max_iter=50, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = mean_loss(W, c) + penalty / 2 * W.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return W.detach(), c.detach()
