"""Layer kinds: a weight of any layer as a matrix, and a low-rank change that means the same on each."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from smidgen.core.layers import MatrixKind, kind_of
from smidgen.core.site import Site


class SamePadded(nn.Conv2d):
    """As timm's Conv2dSame: it pads in its own forward, more to the right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=self.padding, groups=self.groups)


LAYERS = {
    "linear": nn.Linear(3, 5),
    "transposed": Conv1D(5, 3),
    "conv1d": nn.Conv1d(3, 5, 3, stride=2, padding=1),
    "conv2d": nn.Conv2d(3, 5, (2, 3), dilation=(1, 2), padding=(1, 2), padding_mode="replicate"),
    "conv2d_grouped": nn.Conv2d(4, 6, 3, groups=2),
    "conv2d_padding_itself": SamePadded(4, 6, 3, stride=2, groups=2),
    "conv3d": nn.Conv3d(2, 3, 2),
    "embedding": nn.Embedding(7, 5),
}
FANS = {
    "linear": (5, 3),
    "transposed": (5, 3),
    "conv1d": (5, 3 * 3),
    "conv2d": (5, 3 * 2 * 3),
    "conv2d_grouped": (6, 2 * 3 * 3),
    "conv2d_padding_itself": (6, 2 * 3 * 3),
    "conv3d": (3, 2 * 2 * 2 * 2),
    "embedding": (5, 7),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fans_are_those_of_the_weight_as_a_matrix(name: str):
    site = Site.at("", LAYERS[name])
    assert (site.fan_out, site.fan_in) == FANS[name]
    assert site.weight().shape == FANS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_project_then_expand_is_the_layer_with_the_weight_B_A(name: str):
    layer = LAYERS[name]
    site, kind = Site.at("", layer), kind_of(layer)
    A, B = torch.randn(2, site.fan_in), torch.randn(site.fan_out, 2)
    x = kind.probe(layer, torch.Generator().manual_seed(0))
    weights = {"weight": kind.as_stored(layer.weight, B @ A)}
    if getattr(layer, "bias", None) is not None:
        weights["bias"] = torch.zeros_like(layer.bias)
    expected = torch.func.functional_call(layer, weights, (x,))
    torch.testing.assert_close(site.expand(site.project(x, A), B), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_are_read_and_written_make_the_whole(name: str):
    layer, kind = LAYERS[name], kind_of(LAYERS[name])
    stored = layer.weight.detach().clone()
    M = kind.read_rows(stored, slice(None)).clone()
    for start in range(len(M)):
        assert torch.equal(kind.read_rows(stored, slice(start, start + 1)), M[start : start + 1])
    for start in (0, 2):
        kind.write_rows(stored, slice(start, start + 2), 2 * M[start : start + 2])
    changed = kind.read_rows(stored, slice(None))
    assert torch.equal(changed[:2], 2 * M[:2])
    assert torch.equal(changed[4:], M[4:])
    assert torch.equal(kind.as_stored(stored, changed), stored)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_scaling_the_columns_is_scaling_the_input(name: str):
    layer, kind = LAYERS[name], kind_of(LAYERS[name])
    x = kind.probe(layer, torch.Generator().manual_seed(0))
    v = torch.rand(kind.input_channels(layer)) + 0.5
    stored = layer.weight.detach()
    rows = [slice(0, 2), slice(2, None)]
    M = torch.cat([kind.scale_columns(layer, kind.read_rows(stored, part), v, part) for part in rows])
    expected = layer(x * kind.channels(layer, v, x))
    actual = torch.func.functional_call(layer, {"weight": kind.as_stored(stored, M)}, (x,))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("layer", "x", "shape"),
    [
        (nn.LayerNorm(4), torch.randn(2, 3, 4), (4,)),
        (nn.RMSNorm(4), torch.randn(2, 3, 4), (4,)),
        (nn.LayerNorm((3, 4)), torch.randn(2, 3, 4), (3, 4)),
        (nn.BatchNorm1d(4), torch.randn(3, 4), (4,)),
        (nn.BatchNorm1d(4), torch.randn(3, 4, 5), (4, 1)),
        (nn.BatchNorm2d(4), torch.randn(3, 4, 5, 5), (4, 1, 1)),
        (nn.GroupNorm(2, 4), torch.randn(3, 4, 5, 5), (4, 1, 1)),
        (nn.InstanceNorm1d(4, affine=True), torch.randn(3, 4, 5), (4, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_channels_of_a_norm_stand_where_its_own_weight_does(layer: nn.Module, x: torch.Tensor, shape: tuple[int, ...]):
    site = Site.at("", layer)
    assert not site.kind.low_rank
    v = torch.arange(1.0, site.fan_out + 1)
    assert site.channels(v, x).shape == shape
    scaled = (
        torch.func.functional_call(
            layer, {"weight": layer.weight * v.view(layer.weight.shape), "bias": torch.zeros(layer.weight.shape)}, (x,)
        )
        if getattr(layer, "bias", None) is not None
        else F.rms_norm(x, (4,), layer.weight * v)
    )
    torch.testing.assert_close(scaled, layer(x) * site.channels(v, x))


def test_norms_of_other_libraries_count_by_name_and_shape_and_others_do_not():
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class NormedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

    assert kind_of(LlamaRMSNorm()).name == "norm"
    assert kind_of(NormedLinear()) is None
    assert kind_of(nn.BatchNorm1d(4, affine=False)) is None
    assert kind_of(nn.ReLU()) is None
    assert kind_of(nn.Bilinear(2, 2, 2)) is None


@pytest.mark.parametrize(
    ("shape", "fans", "stack"),
    [((5, 3), (5, 3), 1), ((2, 5, 3), (5, 3), 2), ((5,), (5, 1), 1), ((), (1, 1), 1), ((5, 3, 2, 2), (5, 12), 1)],
    ids=["matrix", "experts", "vector", "number", "kernel"],
)
def test_a_parameter_is_a_matrix_a_stack_of_them_or_a_vector(shape: tuple[int, ...], fans: tuple[int, int], stack: int):
    kind, W = MatrixKind(torch.Size(shape)), torch.randn(shape)
    assert kind.fans(nn.Identity()) == fans
    assert kind.stack == stack
    M = kind.read_rows(W, slice(None))
    assert M.shape == (stack * fans[0], fans[1])
    assert torch.equal(kind.as_stored(W, M), W)
    changed = W.clone()
    kind.write_rows(changed, slice(0, 1), M[:1] + 1)
    assert torch.equal(kind.read_rows(changed, slice(None))[0], M[0] + 1)
    assert kind.low_rank == (len(shape) in (2, 3))


def test_a_parameter_site_of_a_kernel_in_another_memory_format_reads_and_writes_the_same():
    layer = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    kind, M = MatrixKind(layer.weight.shape), torch.randn(2, 36)
    W = layer.weight.detach().clone(memory_format=torch.preserve_format)
    assert torch.equal(kind.read_rows(W, slice(1, 3)), layer.weight[1:3].reshape(2, 36))
    kind.write_rows(W, slice(1, 3), M)
    assert torch.equal(kind.read_rows(W, slice(1, 3)), M)
    assert torch.equal(W[0], layer.weight[0])
