"""The probe against scikit-learn's logistic regression, and closed forms."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from smidgen.auto import linear_probe
from smidgen.auto.linear_probe import fit_probe


def blobs(classes: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.arange(rows) % classes
    centres = torch.randn(classes, 6)
    scales = torch.tensor([0.1, 1.0, 10.0, 1.0, 1.0, 1.0])  # features of unlike size, as hidden states are
    return (centres[targets] + 0.9 * torch.randn(rows, 6)) * scales + 3, targets


@pytest.mark.parametrize("classes", [2, 5])
def test_the_probe_agrees_with_scikit_learn_at_the_same_penalty(classes, monkeypatch):
    features, targets = blobs(classes)
    monkeypatch.setattr(linear_probe, "_PENALTIES", (0.01,))
    probe = fit_probe(features, targets, classes, F.cross_entropy, seed=0)
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
    probe = fit_probe(features, targets, 2, F.cross_entropy, seed=0)
    assert torch.isfinite(probe.weight).all()
    assert float((probe(features).argmax(1) == targets).float().mean()) > 0.8


def test_noise_asks_for_the_strongest_penalty_and_signal_for_a_weaker_one():
    noise, targets = torch.randn(400, 50), torch.arange(400) % 2
    strong = fit_probe(noise, targets, 2, F.cross_entropy, seed=0).penalty
    signal = torch.cat([noise, (targets * 2.0 - 1)[:, None]], dim=1)
    assert strong == max(linear_probe._PENALTIES)
    assert fit_probe(signal, targets, 2, F.cross_entropy, seed=0).penalty < strong


def test_a_number_is_found_by_least_squares():
    features = torch.randn(500, 4)
    targets = features @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 3

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs[:, 0], targets)

    probe = fit_probe(features, targets, 1, loss, seed=0)
    assert float(loss(probe(features), targets)) < 1e-4


def test_a_handful_of_rows_is_enough():
    features, targets = blobs(2, rows=8)
    probe = fit_probe(features, targets, 2, F.cross_entropy, seed=0)
    assert torch.isfinite(probe(features)).all()


def test_the_same_seed_gives_the_same_probe():
    features, targets = blobs(3)
    one, other = (fit_probe(features, targets, 3, F.cross_entropy, seed=5) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
