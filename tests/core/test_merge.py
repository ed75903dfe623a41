"""Merging says beforehand what it would lose, and writes all or nothing."""

import math

import pytest
import torch
from torch import Tensor, nn

from smidgen import AdapterSet, LoRA, Rows, Stack, Targets, attach
from smidgen.core import merge
from smidgen.core.adapter import Adapter
from smidgen.core.errors import AttachError, MergeError, NotMergeable
from smidgen.core.layers import LinearKind
from smidgen.core.storage import WeightStorage, register_storage
from smidgen.methods.bitfit import BitFit
from smidgen.methods.ia3 import IA3


def adapted(dtype: torch.dtype = torch.float32, update: float = 1.0) -> tuple[nn.Sequential, AdapterSet]:
    """Two layers with updates of about this size in each entry; the weights are about 1."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    model.to(dtype)
    adapters = attach(model, LoRA(rank=1, alpha=1.0, targets=Targets.of_type(nn.Linear)))
    with torch.no_grad():
        for part in adapters.parts("default").values():
            part.A.copy_(torch.randn_like(part.A))
            part.B.copy_(update * torch.randn_like(part.B))
    return model, adapters


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_that_rounding_would_swallow_is_refused_with_figures(dtype: torch.dtype):
    epsilon = torch.finfo(dtype).eps
    model, adapters = adapted(dtype, update=epsilon)
    before, x = bits(model), torch.randn(3, 8, dtype=dtype)
    output = model(x)
    with pytest.raises(MergeError) as error:
        adapters.merge()
    text = str(error.value)
    assert f"rounding to {str(dtype).removeprefix('torch.')} would lose up to " in text
    assert "2 of 2 sites above max_error=0.05" in text
    assert "Nothing was changed" in text
    assert same(bits(model), before)
    assert torch.equal(model(x), output)
    assert adapters.active == "default"


def test_the_figure_is_the_lost_part_of_the_update_and_the_message_says_what_would_allow_it():
    _, adapters = adapted(torch.bfloat16, update=0.03)
    lost = 0.0
    for site in adapters.sites("default"):
        W, update = site.weight().float(), adapters.parts("default")[site.name].weight_delta(slice(None)).detach()
        rounded = (W + update).bfloat16().float()
        lost = max(lost, float((rounded - (W + update)).norm() / update.norm()))
    with pytest.raises(MergeError) as error:
        adapters.merge(max_error=lost / 2)
    assert f"would lose up to {lost:.0%} of the update" in str(error.value)
    allowed = float(str(error.value).rpartition("max_error=")[2].rstrip(")"))
    report = adapters.merge(max_error=allowed)
    assert math.isclose(report.worst, lost, rel_tol=1e-4)
    assert set(report.errors) == {"0", "1"}
    assert str(report).startswith(f"merged 2 sites; relative error of the update at most {lost:.1e} (")
    assert adapters.names == []


def test_a_merge_in_fp32_loses_next_to_nothing_even_of_a_small_update():
    _, adapters = adapted(update=1e-4)
    assert adapters.merge().worst < 1e-2


def test_a_merge_is_computed_in_fp32_and_rounded_once():
    model, adapters = adapted(torch.bfloat16)
    expected = {
        f"{site.name}.weight": (
            site.weight().float() + adapters.parts("default")[site.name].weight_delta(slice(None))
        ).bfloat16()
        for site in adapters.sites("default")
    }
    adapters.merge()
    assert all(torch.equal(dict(model.named_parameters())[name], W) for name, W in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_leaves_the_weight_as_it_is_loses_nothing_of_it(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(3, 5)).to(dtype)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapters = attach(model, BitFit(targets="0"))
    with torch.no_grad():
        adapters.parameters()[0].fill_(0.5)
    assert adapters.merge().errors == {"0": 0.0}
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0].bias, (bias.float() + 0.5).to(dtype))


def test_the_layer_that_is_tried_is_the_smallest_of_its_kind(monkeypatch: pytest.MonkeyPatch):
    _, adapters = adapted()  # Linear(8, 12), Linear(12, 4)
    tried: list[int] = []
    probe = LinearKind.probe
    monkeypatch.setattr(
        LinearKind,
        "probe",
        lambda self, layer, generator: (tried.append(len(layer.weight)), probe(self, layer, generator))[1],
    )
    adapters.merge()
    assert tried == [4]
    assert not adapters.names


def test_a_weight_of_many_rows_is_merged_in_blocks_to_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    whole, adapters = adapted()
    adapters.merge()
    monkeypatch.setattr(merge, "_BLOCK_ELEMENTS", 24)  # three rows of eight
    torch.manual_seed(0)
    blocks, adapters = adapted()
    adapters.merge()
    for one, other in zip(whole.parameters(), blocks.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_cannot_spoil_is_measured_while_it_is_written(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    def merged(seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        torch.manual_seed(seed)
        model, adapters = adapted(dtype)
        errors = adapters.merge().errors
        return bits(model), errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "_surely_fits", lambda site, expression, update, max_error: False)
        expected, expected_errors = merged(0)
    monkeypatch.setattr(merge, "_error", lambda site, expression, known: pytest.fail("measured before"))
    written, errors = merged(0)
    assert same(written, expected)
    assert errors == pytest.approx(expected_errors, rel=1e-4)
    assert (min(errors.values()) > 0) == (dtype != torch.float32)


@torch.no_grad()
def test_norms_never_let_through_what_measuring_would_refuse():
    for seed in range(200):
        torch.manual_seed(seed)
        dtype = (torch.bfloat16, torch.float16)[seed % 2]
        model = nn.Sequential(nn.Linear(6, 5))
        model[0].weight.mul_(10.0 ** float(torch.empty(()).uniform_(-7, 3)))
        model.to(dtype)
        adapters = attach(model, LoRA(rank=2, alpha=2.0))
        adapters.parts("default")["0"].B.normal_(std=10.0 ** float(torch.empty(()).uniform_(-9, 3)))
        (site,) = adapters.sites("default")
        update = merge._update_norm(site, "default")
        exact = merge._error(site, "default", update)
        for max_error in (1e-4, 1e-3, 1e-2, 0.05, 0.3):
            if merge._surely_fits(site, "default", update, max_error):
                assert exact <= max_error, (seed, max_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 4096), (5, 3), (7,), (64, 32, 3, 3)])
def test_the_norm_of_a_weight_in_sixteen_bits_is_right_to_a_hundredth(dtype: torch.dtype, shape: tuple[int, ...]):
    for W in (torch.randn(shape).to(dtype), torch.full(shape, 0.02, dtype=dtype)):
        assert merge._norm(W) == pytest.approx(float(W.double().norm()), rel=merge._MARGIN - 1)


# -- all or nothing


def test_a_value_that_is_not_finite_is_refused_and_nothing_is_written():
    model, adapters = adapted()
    with torch.no_grad():
        adapters.parts("default")["1"].B[0, 0] = math.nan
    before = [(p, p.detach().clone()) for p in (*model[0].parameters(), *model[1].parameters())]
    with pytest.raises(MergeError, match="not finite at 1; nothing was changed"):
        adapters.merge()
    assert all(torch.equal(p.nan_to_num(), was.nan_to_num()) for p, was in before)


def test_a_bias_that_overflows_its_dtype_is_refused():
    model = nn.Sequential(nn.Linear(3, 5)).half()
    adapters = attach(model, BitFit(targets="0"))
    with torch.no_grad():
        adapters.parameters()[0].fill_(1e5)  # finite in fp32, infinite in fp16
    with pytest.raises(MergeError, match="not finite"):
        adapters.merge()
    assert torch.isfinite(model[0].bias).all()


def test_a_layer_whose_forward_does_more_with_its_weight_is_refused_by_trying_it():
    class Normalised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)

    model = nn.Sequential(Normalised(3, 5))
    adapters = attach(model, LoRA(rank=2))
    with torch.no_grad():
        adapters.parts("default")["0"].B.normal_()
    before = bits(model)
    with pytest.raises(
        MergeError, match=r"at 0 the merged Normalised differs from the running one by .*nothing was changed"
    ):
        adapters.merge()
    assert same(bits(model), before)


def test_trying_a_layer_leaves_its_mode_as_it_was():
    model, adapters = adapted()
    model.train()
    model[1].eval()
    adapters.merge()
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


# -- tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(ids)))


@pytest.mark.parametrize("place", ["tokens", "head"])
def test_a_tied_weight_is_refused_by_the_names_of_both_places(place: str):
    model = Tied()
    adapters = attach(model, LoRA(rank=2, targets=[place, "body"]))
    before = bits(model)
    with pytest.raises(MergeError, match=r"tokens.weight and head.weight are one tied tensor: merging at .*Untie them"):
        adapters.merge()
    assert same(bits(model), before)


def test_a_layer_that_two_places_call_is_one_weight_and_merges():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    adapters = attach(model, LoRA(rank=2, targets=Targets.of_type(nn.Linear)))
    with torch.no_grad():
        adapters.parts("default")["0"].B.normal_()
    x = torch.randn(2, 3)
    running = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), running)


# -- several adapters


def test_what_a_call_adapter_scales_includes_what_a_parameter_adapter_changed():
    """BitFit on a bias as a parameter and IA3 on the call of the layer: y = l (W x + b + c)."""
    model = nn.Sequential(nn.Linear(3, 5))
    adapters = attach(model, IA3(targets="0"), "scale")
    adapters.add(BitFit(targets=Targets("0").parameter("bias")), "shift")
    with torch.no_grad():
        for p in adapters.parameters("scale", "shift"):
            p.add_(torch.randn_like(p))
    x = torch.randn(2, 3)
    for order in (Stack("scale", "shift"), Stack("shift", "scale")):
        adapters.activate(order)
        running = model(x)
        layer = model[0]
        scale, shift = adapters.parameters("scale")[0].flatten(), adapters.parameters("shift")[0]
        torch.testing.assert_close(running, scale * (x @ layer.weight.T + layer.bias + shift))
    adapters.merge()
    torch.testing.assert_close(model(x), running)


def test_merging_one_of_several_leaves_the_others_working_on_the_new_base():
    model, adapters = adapted()
    adapters.add(LoRA(rank=2, targets="0"), "other")
    with torch.no_grad():
        adapters.parts("other")["0"].B.normal_()
    x = torch.randn(3, 8)
    adapters.activate(Stack("default", "other"))
    both = model(x)
    adapters.activate("other")
    adapters.merge("default")
    assert adapters.names == ["other"]
    assert adapters.active == "other"
    torch.testing.assert_close(model(x), both)


def test_what_is_active_and_merged_is_active_no_more():
    _, adapters = adapted()
    adapters.add(LoRA(rank=2, targets="0"), "other")
    adapters.activate(Stack("default", "other"))
    adapters.merge("default")
    assert adapters.active is None


def test_merging_nothing_or_rows_is_an_error():
    _, adapters = adapted()
    adapters.activate(None)
    with pytest.raises(AttachError, match=r"nothing to merge: nothing is active. The model has default"):
        adapters.merge()
    with pytest.raises(AttachError, match="no single weight"):
        adapters.merge(Rows("default", None))
    assert adapters.names == ["default"]


# -- what cannot be merged


def test_an_adapter_of_activations_is_refused_by_its_name():
    class Squares(Adapter):
        mergeable = False

        def reset(self, generator: torch.Generator | None) -> None: ...

        def forward(self, call, x):
            return call(x) ** 2

    class Squaring(LoRA):
        def build(self, site):
            return Squares(site)

    adapters = attach(nn.Sequential(nn.Linear(3, 5)), Squaring(), "squares")
    with pytest.raises(NotMergeable, match=r'"squares" \(Squares at 0\) changes activations, not weights'):
        adapters.merge()
    with pytest.raises(NotMergeable, match="Keep it attached"):
        Squares(adapters.sites("squares")[0]).merged(torch.zeros(1, 1), None, slice(None))


class FixedPoint(WeightStorage):
    """Whole numbers of sixteenths: can be read, cannot be written."""

    name = "fixed point"

    def matches(self, weight: Tensor) -> bool:
        return weight.dtype == torch.int16

    def read(self, weight: Tensor) -> Tensor:
        return weight.float() / 16


class FixedPointLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 5)
        self.weight = nn.Parameter((self.weight.detach() * 16).round().to(torch.int16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 16, self.bias)


def test_a_backend_that_reads_but_does_not_write_runs_and_refuses_to_merge(monkeypatch: pytest.MonkeyPatch):
    from smidgen.core import storage

    monkeypatch.setattr(storage, "_STORAGES", list(storage._STORAGES))
    register_storage(FixedPoint())
    model = nn.Sequential(FixedPointLinear())
    adapters = attach(model, LoRA(rank=2))
    (site,) = adapters.sites("default")
    assert torch.equal(site.weight(), model[0].weight.float() / 16)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    with torch.no_grad():
        adapters.parts("default")["0"].B.normal_()
    part, x = adapters.parts("default")["0"], torch.randn(2, 3)
    expected = x @ (site.weight() + part.weight_delta(slice(None))).T + model[0].bias
    torch.testing.assert_close(model(x), expected)
    before = bits(model)
    with pytest.raises(
        MergeError, match="a weight held as fixed point cannot be merged into: keep the adapter attached"
    ):
        adapters.merge()
    assert same(bits(model), before)
