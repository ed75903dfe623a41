"""The probe against scikit-learn's logistic regression, and closed forms."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from smidgen.auto import linear_probe
from smidgen.auto.linear_probe import fit_probe


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (losses if weights is None else losses * weights).mean()


def squares(outputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    losses = (outputs[:, 0] - targets).square()
    return (losses if weights is None else losses * weights).mean()


def blobs(classes: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.arange(rows) % classes
    centres = torch.randn(classes, 6)
    scales = torch.tensor([0.1, 1.0, 10.0, 1.0, 1.0, 1.0])  # features of unlike size, as hidden states are
    return (centres[targets] + 0.9 * torch.randn(rows, 6)) * scales + 3, targets


@pytest.mark.parametrize("classes", [2, 5])
def test_the_probe_agrees_with_scikit_learn_at_the_same_penalty(classes, monkeypatch):
    features, targets = blobs(classes)
    monkeypatch.setattr(linear_probe, "_PENALTIES", (0.01,))
    probe = fit_probe(features, targets, classes, cross_entropy, seed=0)
    z = ((features - features.mean(0)) / features.std(0)).numpy()
    other = LogisticRegression(C=1 / (0.01 * len(z)), tol=1e-8, max_iter=2000).fit(z, targets.numpy())
    ours = probe(features).softmax(1).numpy()
    theirs = other.predict_proba(z)
    if classes > 2:  # with two classes scikit-learn has one vector where we have two, so the penalty means less
        numpy.testing.assert_allclose(ours, theirs, atol=5e-3)
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.99


def test_a_constant_feature_does_no_harm():
    features, targets = blobs(2)
    features[:, 3] = 7.0
    probe = fit_probe(features, targets, 2, cross_entropy, seed=0)
    assert torch.isfinite(probe.weight).all()
    assert float((probe(features).argmax(1) == targets).float().mean()) > 0.8


def test_noise_asks_for_the_strongest_penalty_and_signal_for_a_weaker_one():
    noise, targets = torch.randn(400, 50), torch.arange(400) % 2
    strong = fit_probe(noise, targets, 2, cross_entropy, seed=0).penalty
    signal = torch.cat([noise, (targets * 2.0 - 1)[:, None]], dim=1)
    assert strong == max(linear_probe._PENALTIES)
    assert fit_probe(signal, targets, 2, cross_entropy, seed=0).penalty < strong


def test_a_number_is_found_by_least_squares():
    features = torch.randn(500, 4)
    targets = features @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 3

    probe = fit_probe(features, targets, 1, squares, seed=0)
    assert float(squares(probe(features), targets, None)) < 1e-4


def test_a_handful_of_rows_is_enough():
    features, targets = blobs(2, rows=8)
    probe = fit_probe(features, targets, 2, cross_entropy, seed=0)
    assert torch.isfinite(probe(features)).all()


def test_the_same_seed_gives_the_same_probe():
    features, targets = blobs(3)
    one, other = (fit_probe(features, targets, 3, cross_entropy, seed=5) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_a_row_of_weight_three_is_three_rows(monkeypatch):
    monkeypatch.setattr(linear_probe, "_FEW", 10_000)  # nothing is held out, so that both are fitted on the same
    features, targets = blobs(3, rows=60)
    counts = torch.arange(60) % 4  # 0 to 3 times
    times = torch.repeat_interleave(torch.arange(60), counts)
    weighted = fit_probe(features, targets, 3, cross_entropy, seed=0, weights=counts.float())
    repeated = fit_probe(features[times], targets[times], 3, cross_entropy, seed=0)
    torch.testing.assert_close(weighted.weight, repeated.weight, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(weighted.bias, repeated.bias, rtol=2e-3, atol=1e-3)
    plain = fit_probe(features, targets, 3, cross_entropy, seed=0)
    assert not torch.allclose(plain.weight, weighted.weight, rtol=0.1)


def test_weighted_least_squares_is_the_closed_form(monkeypatch):
    """(z' D z + n p / 2 I) w = z' D y, for squares with penalty p / 2 |w|^2, D the weights of 1 on average."""
    monkeypatch.setattr(linear_probe, "_FEW", 10_000)
    monkeypatch.setattr(linear_probe, "_PENALTIES", (0.05,))
    features = torch.randn(200, 4)
    targets = features @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + torch.randn(200)
    weights = torch.rand(200) * 3
    D = weights / weights.mean()
    centre = (D[:, None] * features).mean(0)
    spread = (D[:, None] * (features - centre).square()).mean(0).sqrt()
    z, y = (features - centre) / spread, targets - (D * targets).mean()
    w = torch.linalg.solve(z.T @ (D[:, None] * z) + 200 * 0.05 / 2 * torch.eye(4), z.T @ (D * y))
    probe = fit_probe(features, targets, 1, squares, seed=0, weights=weights)
    torch.testing.assert_close(probe.weight[0], w / spread, rtol=1e-3, atol=1e-4)
