"""BatchNorm tuning against torch's own norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.batchnorm_tuning import BatchNormTuning

from ..laws.bodies import trained_batch_norm


def net():
    torch.manual_seed(0)
    model = nn.Sequential(trained_batch_norm()).double()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    return model, 2 * torch.randn(6, 4, 3, 3, dtype=torch.float64) + 1


def tuned(model: nn.Module, **settings):
    adapters = attach(model, BatchNormTuning(targets="0", **settings))
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.weight)
    nn.init.normal_(part.bias)
    return adapters, part


@pytest.mark.parametrize("training", [False, True])
def test_frozen_statistics_are_the_bases_also_while_training(training: bool):
    model, x = net()
    _, part = tuned(model)
    norm, before = model[0], {k: v.clone() for k, v in model[0].named_buffers(recurse=False)}
    model.train(training)
    weight, bias = norm.weight + part.weight, norm.bias + part.bias
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert norm.training is training
    assert all(torch.equal(v, before[k]) for k, v in norm.named_buffers(recurse=False))


def test_adapted_statistics_follow_the_data_and_belong_to_the_adapter(tmp_path):
    model, x = net()
    adapters, part = tuned(model, statistics="adapted")
    norm, before = model[0], {k: v.clone() for k, v in model[0].named_buffers(recurse=False)}
    mean, var = before["running_mean"].clone(), before["running_var"].clone()
    weight, bias = norm.weight + part.weight, norm.bias + part.bias
    model.train()
    for _ in range(3):
        expected = F.batch_norm(x, mean, var, weight, bias, True, 0.1)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(part.running_mean, mean)
    torch.testing.assert_close(part.running_var, var)
    assert part.num_batches_tracked == before["num_batches_tracked"] + 3
    model.eval()
    expected = F.batch_norm(x, mean, var, weight, bias, False)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert all(torch.equal(v, before[k]) for k, v in norm.named_buffers(recurse=False))
    adapters.merge()  # into weight and bias, where the base's statistics stay
    adapters.detach()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert torch.equal(norm.running_mean, before["running_mean"])


def test_layers_that_do_more_than_normalise_keep_doing_it():
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model, x = nn.Sequential(BatchNormAct(4)).double(), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    _, part = tuned(model.eval())
    norm = model[0]
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight + part.weight, part.bias, False).relu()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


def test_by_itself_it_takes_all_such_norms_of_the_body_and_two_numbers_a_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 2))
    adapters = attach(model, BatchNormTuning())
    assert list(adapters.parts("default")) == ["1", "2"]
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 4 + 2 * 4


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="one of frozen, adapted"):
        BatchNormTuning(statistics="batch")
    with pytest.raises(TargetError, match="LayerNorm is no BatchNorm"):
        attach(nn.Sequential(nn.LayerNorm(4)), BatchNormTuning(targets="0"))
