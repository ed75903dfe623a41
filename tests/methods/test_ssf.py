"""SSF against its equation."""

import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import NotMergeable, TargetError
from smidgen.methods.ssf import SSF


def test_every_output_channel_is_scaled_and_shifted_and_merging_leaves_nothing():
    layer, x = nn.Linear(3, 5).double(), torch.randn(4, 3, dtype=torch.float64)
    model = nn.Sequential(layer)
    expected = layer(x) * torch.arange(5) + 0.5
    adapters = attach(model, SSF(targets=Targets("0")))
    part = adapters.parts("default")["0"]
    with torch.no_grad():
        part.g.copy_(torch.arange(5))
        part.s.fill_(0.5)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 5
    adapters.merge()
    adapters.detach()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)
    assert len(list(model.parameters())) == 2


def test_channels_of_a_convolution_are_its_second_axis():
    model, x = nn.Sequential(nn.Conv2d(3, 5, 2).double()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = model(x) * torch.arange(5.0).view(1, 5, 1, 1)
    part = attach(model, SSF(targets="0")).parts("default")["0"]
    part.g.data.copy_(torch.arange(5))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 5, bias=False), (4, 3)), (nn.Conv2d(3, 5, 2, bias=False), (2, 3, 4, 4))]
)
def test_a_layer_without_bias_is_shifted_too_and_does_not_merge(layer, shape):
    model, x = nn.Sequential(layer), torch.randn(shape)
    channels = (5, *[1] * (len(shape) - 2))
    expected = layer(x) * torch.arange(5).view(channels) + 0.5
    adapters = attach(model, SSF())  # "auto" finds it
    part = adapters.parts("default")["0"]
    with torch.no_grad():
        part.g.copy_(torch.arange(5))
        part.s.fill_(0.5)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(NotMergeable):
        adapters.merge()
    with pytest.raises(NotMergeable, match="0 has no bias that s could become part of"):
        part.merged(torch.ones(5, 3), None, slice(None))
    torch.testing.assert_close(model(x), expected)


def test_what_gives_no_channels_is_refused():
    with pytest.raises(TargetError, match="ReLU gives no channels"):
        attach(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), SSF(targets="1"))
