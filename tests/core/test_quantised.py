"""Weights in few bits: their numbers are the papers', and a layer that holds them does what a plain one would do."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from smidgen import LoRA, attach
from smidgen.core import quantised
from smidgen.core.errors import ConfigError, NonFiniteError
from smidgen.core.quantised import BLOCK, FORMATS, format_named, in_blocks, normal_float
from smidgen.core.quantised_linear import (
    QuantisedLinear,
    QuantisedWeight,
    quantise_,
    quantised_linear,
    quantised_linear_of_made,
)
from smidgen.core.safe import read_tensors, write_tensors
from smidgen.core.storage import storage_of

# Dettmers et al. 2023, arXiv:2305.14314, appendix E
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def dense(name: str, W: Tensor) -> Tensor:
    """W, quantised and read again."""
    shape, form = tuple(W.shape), format_named(name)
    return form.reader(shape, form.quantised(shape, in_blocks(W), W.device))(slice(None), slice(None))


def plain_of(layer: QuantisedLinear) -> nn.Linear:
    """A plain layer with the weight that the quantised one has."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(layer.dense(slice(None)))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


# -- numbers


def test_the_values_of_nf4_are_those_that_the_paper_prints():
    assert torch.allclose(normal_float(), torch.tensor(PUBLISHED, dtype=torch.float64), rtol=0, atol=3e-7)


def test_every_weight_takes_the_nearest_value_of_its_block_before_the_scales_are_rounded():
    W = torch.randn(6, 2 * BLOCK)
    packed = FORMATS["nf4"].quantised((6, 2 * BLOCK), in_blocks(W), W.device)["packed"]
    codes = torch.stack([packed >> 4, packed & 15], -1).view(6, 2, BLOCK).long()
    scaled = (W.view(6, 2, BLOCK) / W.view(6, 2, BLOCK).abs().amax(-1, keepdim=True)).double()
    assert torch.equal(codes, (scaled[..., None] - normal_float()).abs().argmin(-1))


def test_double_quantisation_moves_a_scale_by_no_more_than_half_a_step():
    W = torch.randn(300, BLOCK)  # two groups of scales, one of them not full
    pieces = FORMATS["nf4"].quantised((300, BLOCK), in_blocks(W), W.device)
    scales = (pieces["scales"] * pieces["scale_steps"][:, None] + pieces["scale_mean"]).view(-1)[:300]
    steps = pieces["scale_steps"].repeat_interleave(256)[:300]
    assert ((scales - W.abs().amax(1)).abs() <= steps / 2 * 1.001).all()


def test_normal_weights_lose_what_sixteen_values_for_blocks_of_64_lose():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(256, 256, generator=generator)
    blocks = W.view(-1, BLOCK).double()
    c = blocks.abs().amax(1, keepdim=True)
    best = c * normal_float()[((blocks / c)[..., None] - normal_float()).abs().argmin(-1)]
    ideal = float((best - blocks).norm() / blocks.norm())  # with scales that are not rounded
    lost = float((dense("nf4", W) - W).norm() / W.norm())
    assert 0.08 < ideal < 0.10
    assert abs(lost - ideal) < 2e-3 * ideal + 1e-4


def test_nf4_is_bitsandbytes_to_the_last_code():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    W = torch.randn(128, 2 * BLOCK)
    theirs, state = functional.quantize_4bit(W, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    ours = FORMATS["nf4"].quantised((128, 2 * BLOCK), in_blocks(W), W.device)
    assert torch.allclose(state.code.double(), normal_float(), rtol=0, atol=3e-7)
    assert torch.equal(ours["packed"].view(-1), theirs.view(-1))
    assert torch.allclose(functional.dequantize_4bit(theirs, state), dense("nf4", W), atol=2e-2)


def test_int8_is_off_by_no_more_than_half_a_step_of_its_row():
    W = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    assert ((dense("int8", W) - W).abs() <= W.abs().amax(1, keepdim=True) / 254 * 1.0001).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 65), (2, 640)])
def test_any_shape_and_rows_of_zeros_are_held(name: str, shape: tuple[int, int]):
    W = torch.randn(shape)
    W[-1] = 0
    found = dense(name, W)
    assert found.shape == W.shape
    assert (found[-1].abs() <= 1e-2 * W.abs().max()).all()
    assert (found - W).norm() <= 0.2 * W.norm() + 1e-12


@pytest.mark.parametrize("name", FORMATS)
def test_rows_and_columns_are_read_as_they_are_in_the_whole(name: str):
    W = torch.randn(9, 200)
    form = FORMATS[name]
    read = form.reader((9, 200), form.quantised((9, 200), in_blocks(W), W.device))
    whole = read(slice(None), slice(None))
    assert torch.equal(read(slice(2, 5), slice(None)), whole[2:5])
    assert torch.equal(read(slice(None), slice(64, 192)), whole[:, 64:192])
    assert torch.equal(read(slice(1, 2), slice(128, 200)), whole[1:2, 128:])


@pytest.mark.parametrize(("name", "bits"), [("nf4", 4.127), ("int8", 8.0)])
def test_the_pieces_take_as_many_bits_as_the_format_says(name: str, bits: float):
    form = FORMATS[name]
    assert math.isclose(form.bits, bits, abs_tol=5e-4)
    size = sum(piece.nbytes for piece in form.empty((4096, 4096), torch.device("meta")).values())
    assert math.isclose(8 * size / 4096**2, bits, rel_tol=1e-3)


def test_a_format_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match='there is no format "nf5" for weights; there are: nf4, int8'):
        format_named("nf5")


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_is_not_finite_is_refused_untouched(name: str):
    layer = nn.Linear(3, 5)
    layer.weight.data[1, 2] = math.nan
    with pytest.raises(NonFiniteError, match="a weight holds NaN or infinity, so it cannot be quantised"):
        quantise_(layer, FORMATS[name])
    assert type(layer) is nn.Linear


def test_the_table_of_nf4_is_copied_to_a_device_once_and_a_fake_one_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantised, "_kept", kept := {})
    elsewhere = torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert quantised._pairs_on(torch.device("cuda", 0)).shape == (256,)
    assert not kept
    assert quantised._pairs_on(elsewhere) is quantised._pairs_on(elsewhere)
    assert list(kept) == [elsewhere]


# -- the layer


@pytest.fixture(params=FORMATS)
def layer(request: pytest.FixtureRequest) -> QuantisedLinear:
    return QuantisedLinear(100, 7, format=request.param)


@pytest.fixture
def in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(size: int, width: int, device: torch.device) -> list[slice]:
        return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]

    monkeypatch.setattr("smidgen.core.quantised_linear.blocks_of", small)


# what dropout drops of x (6, 100): a mask of its entries or of its features, or the places, some of them twice
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "elements": (torch.arange(600).view(6, 100) % 7 > 1).to(torch.uint8),
    "features": (torch.arange(100) % 3 > 0).to(torch.uint8),
    "places": torch.arange(0, 1200, 11) % 600,
}


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    kept = torch.ones(6, 100, dtype=x.dtype)
    kept = kept.flatten().index_fill(0, mask, 0).view(6, 100) if mask.dtype == torch.int64 else kept * mask
    return x * kept.view(x.shape)


@pytest.mark.usefixtures("in_small_blocks")
@pytest.mark.parametrize("made", [False, True], ids=["x", "made"])
@pytest.mark.parametrize("dropout_of", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_output_and_gradients_are_those_of_the_dense_weight_in_fp64(
    name: str, dtype: torch.dtype, dropout_of: str, made: bool
):
    mask = MASKS[dropout_of]
    layer = QuantisedLinear(100, 70, format=name).to(dtype)
    W, b = layer.dense(slice(None), torch.float64), layer.bias.detach().double().requires_grad_()
    shapes = ((2, 3, 100), (2, 100), (70, 2))
    x, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    read = x.sin() if made else x
    expected = F.linear(read, W, b) + 0.7 * masked(read, mask) @ A.T @ B.T
    dy = torch.randn_like(expected)
    ours = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if made:
            return quantised_linear_of_made(torch.sin, [x], layer, A, B, 0.7, mask)
        return quantised_linear(x, layer, A, B, 0.7, mask)

    y = checkpoint(run, *ours, use_reentrant=False)
    assert torch.equal(y, run(*ours))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (y - expected).norm() <= tolerance * expected.norm()
    for got, wanted in zip(
        torch.autograd.grad(y, (*ours, layer.bias), dy.to(dtype)),
        torch.autograd.grad(expected, (x, A, B, b), dy),
        strict=True,
    ):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dropout_of", MASKS)
def test_compiled_it_gives_the_same(layer: QuantisedLinear, dropout_of: str):
    shapes = ((2, 3, 100), (2, 100), (7, 2))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return quantised_linear(x, layer, A, B, 0.7, MASKS[dropout_of])

    torch.compiler.reset()
    results = [f(*inputs) for f in (run, torch.compile(run, backend="eager", fullgraph=True))]
    torch.compiler.reset()
    torch.testing.assert_close(*results)
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in results), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dropout_on", "mask_bytes"), [(None, 0), ("elements", 3 * 256), ("features", 256)])
def test_backward_keeps_the_pieces_and_no_dense_weight(dropout_on: str | None, mask_bytes: int):
    layer = QuantisedLinear(256, 256)
    said = {} if dropout_on is None else {"dropout": 0.2, "dropout_on": dropout_on}
    adapters = attach(nn.Sequential(layer), LoRA(rank=2, targets=["0"], **said))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapters.model(torch.randn(3, 256))
    pieces = sum(piece.nbytes for piece in layer.pieces.values())
    numbers = 3 * 256 + 2 * 256 + 256 * 2 + 3 * 2  # x, A, B, x A^T
    assert sum(kept.values()) == pieces + 4 * numbers + mask_bytes
    assert y.requires_grad


def test_the_weight_looks_like_a_tensor_and_costs_nothing_until_it_is_read(layer: QuantisedLinear, monkeypatch):
    W = layer.weight
    assert type(W) is QuantisedWeight
    assert (W.shape, W.dtype, W.device, W.ndim, W.numel()) == ((7, 100), torch.float32, torch.device("cpu"), 2, 700)
    assert (W.requires_grad, W.is_meta, W.is_floating_point()) == (False, False, True)
    D, x = layer.dense(slice(None)), torch.randn(3, 100)
    assert torch.equal(F.linear(x, W), F.linear(x, D))
    assert torch.equal(torch.cat([W, W]), torch.cat([D, D]))
    assert torch.equal(x @ W.T, x @ D.T)
    assert torch.equal(2 * W + 1, 2 * D + 1)
    assert torch.equal(W[2:4], D[2:4])
    assert W.float().norm() == D.norm()
    assert storage_of(W).name == "quantised"


def test_a_plain_state_dict_is_quantised_as_it_is_loaded_and_its_own_comes_back_by_safetensors(
    layer: QuantisedLinear, tmp_path
):
    plain = nn.Linear(100, 7)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.dense(slice(None)), dense(layer.format_name, plain.weight.detach()))
    write_tensors(tmp_path / "layer.safetensors", layer.state_dict())
    other = QuantisedLinear(100, 7, format=layer.format_name)
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 100)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_the_same_layer_of_its_own(layer: QuantisedLinear, way):
    other = way(layer)
    x = torch.randn(3, 100)
    assert type(other) is QuantisedLinear
    assert torch.equal(other(x), layer(x))
    assert other.packed.data_ptr() != layer.packed.data_ptr()


def test_another_dtype_is_what_it_is_read_in_and_changes_no_piece(layer: QuantisedLinear):
    before = {name: piece.clone() for name, piece in layer.pieces.items()}
    layer.to(torch.bfloat16)
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {name: piece.dtype for name, piece in layer.pieces.items()} == {n: p.dtype for n, p in before.items()}
    assert all(torch.equal(piece, before[name]) for name, piece in layer.pieces.items())
    assert layer(torch.randn(2, 100, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert layer.weight.is_meta


def test_autocast_computes_in_its_dtype(layer: QuantisedLinear):
    x = torch.randn(4, 100)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain_of(layer)(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 2e-2 * expected.norm()


def test_a_fused_encoder_layer_of_torch_reads_it_too():
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    quantise_(encoder.linear1, FORMATS["int8"])
    with torch.no_grad():
        quantised = encoder(x)
        encoder.linear1 = plain_of(encoder.linear1)
        assert torch.allclose(quantised, encoder(x), atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_training_an_adapter_on_it_lowers_the_loss(name: str):
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x, target = torch.randn(32, 8), torch.randn(32, 2)
    quantise_(model[0], FORMATS[name])
    adapters = attach(model, LoRA(rank=4, targets=["0", "2"]), seed=0)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
