"""Conv-Adapter: its formula with torch's own layers, its four placements in a ResNet, and its count of parameters."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from smidgen import AdapterSet, attach
from smidgen.core.errors import AttachError, ConfigError, TargetError
from smidgen.methods.conv_adapter import ConvAdapter

PLACEMENTS = ("convolution_parallel", "convolution_sequential", "residual_parallel", "residual_sequential")


def resnet(kind: str = "bottleneck") -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type=kind)
    return transformers.ResNetModel(config).eval()


def stir(adapters: AdapterSet) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def as_layers(part: Any, **convolution: Any) -> nn.Sequential:
    """The authors' module with these parameters: convolutions as torch has them, then the scale."""
    groups, reads = part.down.shape[0], part.down.shape[0] * part.down.shape[1]
    down = nn.Conv2d(reads, groups, part.down.shape[2:], groups=groups, **convolution)
    up = nn.Conv2d(groups, part.up.shape[0], 1)
    down.load_state_dict({"weight": part.down, "bias": part.down_bias})
    up.load_state_dict({"weight": part.up, "bias": part.up_bias})

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * part.scale.view(1, -1, 1, 1)

    return nn.Sequential(down, nn.ReLU(), up, Scale())


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "dilation": 2}, {"padding_mode": "circular"}, {"groups": 2}])
def test_beside_a_convolution_it_reads_as_the_convolution_does(settings: dict[str, Any]) -> None:
    layer, x = nn.Conv2d(8, 6, 3, padding=1, **settings), torch.randn(2, 8, 7, 9)
    y = layer(x)
    adapters = attach(nn.Sequential(layer), ConvAdapter(targets="0", compression=2))
    assert torch.equal(layer(x), y)
    stir(adapters)
    own = {name: value for name, value in settings.items() if name != "groups"}
    expected = y + as_layers(adapters.parts("default")["0"], padding=1, **own)(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


class SamePadding(nn.Conv2d):
    """A convolution that pads by itself, as EfficientNet's do after TensorFlow's "same"."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, k, s in zip(reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True):
            missing = max(0, (math.ceil(size / s) - 1) * s + k - size)
            sides += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own, and torch's padding."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kernel", [3, (5, 2), 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_beside_a_convolution_that_pads_by_itself_it_reads_what_that_reads(kernel: Any, stride: int) -> None:
    layer, x = SamePadding(8, 6, kernel, stride), torch.randn(2, 8, 8, 7)
    y = layer(x)
    adapters = attach(nn.Sequential(layer), ConvAdapter(targets="0", compression=2))
    assert torch.equal(layer(x), y)
    stir(adapters)
    down, *rest = as_layers(adapters.parts("default")["0"], stride=stride)
    beside = SamePadding(8, 4, kernel, stride, groups=4)
    beside.load_state_dict(down.state_dict())
    torch.testing.assert_close(layer(x), y + nn.Sequential(beside, *rest)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 0, "stride": 3}])
def test_a_forward_of_its_own_that_pads_as_it_says_is_followed_too(settings: dict[str, Any]) -> None:
    layer, x = Standardised(8, 6, 3, **settings), torch.randn(2, 8, 8, 7)
    y = layer(x)
    adapters = attach(nn.Sequential(layer), ConvAdapter(targets="0", compression=2))
    stir(adapters)
    expected = y + as_layers(adapters.parts("default")["0"], **settings)(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_after_a_convolution_it_reads_what_that_gives() -> None:
    layer, x = nn.Conv2d(3, 8, 3, stride=2), torch.randn(2, 3, 9, 9)
    y = layer(x)
    adapters = attach(nn.Sequential(layer), ConvAdapter(targets="0", placement="convolution_sequential"))
    stir(adapters)
    expected = y + as_layers(adapters.parts("default")["0"], padding=1)(y)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("placement", ["residual_parallel", "residual_sequential"])
def test_at_a_block_it_reads_what_the_block_reads_or_gives(placement: Any) -> None:
    model, x = resnet(), torch.randn(2, 16, 7, 7)
    block = model.encoder.stages[1].layers[0]  # 16 channels to 32, every second position
    y = block(x)
    adapters = attach(model, ConvAdapter(placement=placement))
    assert torch.equal(block(x), y)
    stir(adapters)
    part = adapters.parts("default")["encoder.stages.1.layers.0"]
    if placement == "residual_parallel":
        expected = y + as_layers(part, padding=1, stride=2)(x)
    else:
        expected = y + as_layers(part, padding=1)(y)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_placements_are_those_of_the_paper(placement: Any, kind: str) -> None:
    model = resnet(kind)
    adapters = attach(model, ConvAdapter(placement=placement))
    blocks = [f"encoder.stages.{stage}.layers.{n}" for stage, n in ((0, 0), (1, 0), (1, 1))]
    inner = ("0", "1") if kind == "basic" else ("1",)  # a bottleneck's middle convolution sees more than one position
    if placement.startswith("convolution"):
        blocks = [f"{block}.layer.{number}.convolution" for block in blocks for number in inner]
    assert [site.path for site in adapters.sites("default")] == blocks
    stir(adapters)
    model.train()
    model(torch.randn(2, 3, 32, 32)).last_hidden_state.square().sum().backward()
    adapters.check_gradients()


def test_it_trains_as_many_numbers_as_it_says() -> None:
    adapters = attach(nn.Sequential(nn.Conv2d(12, 10, 3)), ConvAdapter(targets="0", compression=4))
    C, O, K, W = 12, 10, 9, 12 // 4
    assert sum(p.numel() for p in adapters.parameters()) == C * K + W + W * O + 2 * O
    odd = attach(nn.Sequential(nn.Conv2d(7, 10, 3)), ConvAdapter(targets="0", compression=2))
    assert odd.parts("default")["0"].groups == 1  # 7 has no other divisor below 3.5


@pytest.mark.parametrize("dimensions", [1, 3])
def test_signals_and_volumes_too(dimensions: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    model, x = nn.Sequential(conv(4, 4, 3, padding=1), conv(4, 6, 3, padding=1)), torch.randn(2, 4, *[5] * dimensions)
    for placement in PLACEMENTS:
        targets = ["1"] if placement.startswith("convolution") else [lambda path, module: path == ""]
        adapters = attach(model, ConvAdapter(targets=targets, placement=placement))
        base = model(x)
        stir(adapters)
        assert not torch.allclose(model(x), base)
        adapters.detach()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TargetError, match="no convolution in a block is recognised"):
        attach(nn.Sequential(nn.Linear(3, 3)), ConvAdapter())
    with pytest.raises(TargetError, match="Linear is no convolution"):
        attach(nn.Sequential(nn.Linear(3, 3)), ConvAdapter(targets="0"))
    with pytest.raises(TargetError, match="ReLU is no block of convolutions"):
        attach(nn.Sequential(nn.ReLU()), ConvAdapter(targets="0", placement="residual_parallel"))
    with pytest.raises(ConfigError, match='placement is "beside"; it is one of convolution_parallel'):
        ConvAdapter(placement="beside")  # type: ignore[arg-type]
    shrinks = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    attach(shrinks, ConvAdapter(targets=[lambda path, module: path == "0"], placement="residual_parallel"))
    with pytest.raises(AttachError, match="which no stride does"):
        shrinks(torch.randn(1, 4, 10, 10))
