"""LoRA against the paper's formula in float64, and against Hugging Face PEFT 0.21.2 with the same numbers in it."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smidgen import AdapterSet, LoRA, Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.lora import LoRAAdapter


class Net(nn.Module):
    """One layer of each kind, each with other fans."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(0, 1))
        self.conv1d = Conv1D(5, 6)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 4, bias=False)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(self.conv1d(self.embed(ids)))))  # (B, T, 4)
        return hidden.mean(1) + self.conv(image).mean((2, 3))


SHAPES = {"embed": (6, 7), "conv": (4, 2 * 2 * 3), "conv1d": (5, 6), "first": (3, 5), "second": (4, 3)}  # (O, I)
TARGETS = Targets(*SHAPES)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"ids": torch.randint(7, (2, 4)), "image": torch.randn(2, 2, 5, 6, dtype=dtype)}


def adapted(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Net, AdapterSet]:
    torch.manual_seed(1)
    model = Net().to(dtype).eval()
    adapters = attach(model, LoRA(targets=TARGETS, **settings), "style")
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(torch.randn_like(p))
    return model, adapters


# -- the formula


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 2, "alpha": 3.0}, 3 / 2),
        ({"rank": 4, "alpha": 3.0, "rank_stabilised": True}, 3 / math.sqrt(4)),
        ({"rank": 1}, 16.0),
    ],
)
def test_a_linear_layer_computes_the_formula_of_the_paper(settings: dict[str, Any], scale: float):
    model, adapters = adapted(settings, torch.float64)
    part, layer, x = adapters.parts("style")["first"], model.first, torch.randn(2, 3, 5, dtype=torch.float64)
    W = layer.weight + scale * part.B @ part.A  # equation 3
    torch.testing.assert_close(layer(x), x @ W.T + layer.bias, rtol=1e-13, atol=1e-13)


def test_every_layer_computes_what_its_changed_weight_would():
    model, adapters = adapted({"rank": 2, "alpha": 3.0}, torch.float64)
    inputs = batch(torch.float64)
    running = model(**inputs)
    weights = {}
    for name, part in adapters.parts("style").items():
        W = dict(model.named_parameters())[f"{name}.weight"]
        delta = 1.5 * part.B @ part.A  # (O, I)
        weights[f"{name}.weight"] = W + (delta.T if name in ("embed", "conv1d") else delta).reshape(W.shape)
    adapters.activate(None)
    expected = torch.func.functional_call(model, weights, (), inputs)
    torch.testing.assert_close(running, expected, rtol=1e-12, atol=1e-12)


def test_experts_have_factors_of_their_own():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(3, 5, 4))
    adapters = attach(
        nn.ModuleDict({"experts": layer}), LoRA(rank=2, alpha=3.0, targets=Targets("experts").parameter("weight"))
    )
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_()
    (part,) = adapters.parts("default").values()
    assert part.A.shape == (3 * 2, 4)
    assert part.B.shape == (3 * 5, 2)
    for expert in range(3):
        rows = slice(5 * expert, 5 * (expert + 1))
        A, B = part.A[2 * expert : 2 * (expert + 1)], part.B[rows]
        torch.testing.assert_close(part.weight_delta(rows), 1.5 * B @ A)


# -- sizes


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_number_of_parameters_is_rank_times_fans(rank: int):
    _, adapters = adapted({"rank": rank})
    assert sum(p.numel() for p in adapters.parameters()) == sum(rank * sum(fans) for fans in SHAPES.values())
    for name, (fan_out, fan_in) in SHAPES.items():
        part = adapters.parts("style")[name]
        assert part.A.shape == (rank, fan_in)
        assert part.B.shape == (fan_out, rank)


def test_patterns_set_rank_and_alpha_by_site_and_the_last_match_counts():
    patterns: dict[str, Any] = {
        "rank_pattern": {"*": 3, "conv*": 4, "conv": 5},
        "alpha_pattern": {"first": 6.0},
        "alpha": 2.0,
    }
    _, adapters = adapted(patterns)
    parts = adapters.parts("style")
    assert {name: part.A.shape[0] for name, part in parts.items()} == {
        "embed": 3,
        "conv": 5,
        "conv1d": 4,
        "first": 3,
        "second": 3,
    }
    assert parts["first"].scale == 6 / 3
    assert parts["conv"].scale == 2 / 5


# -- the start


@torch.no_grad()
def test_A_starts_as_the_authors_do_and_B_at_zero():
    """loralib: kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(I).  On an embedding A is zero and B normal."""
    adapters = attach(
        nn.Sequential(nn.Linear(100, 10), nn.Embedding(50, 40)), LoRA(rank=64, targets=["0", "1"]), seed=0
    )
    linear, embedding = adapters.parts("default")["0"], adapters.parts("default")["1"]
    assert not linear.B.any()
    assert math.isclose(float(linear.A.abs().max()), 1 / 10, rel_tol=0.01)
    assert math.isclose(float(linear.A.std()), 1 / 10 / math.sqrt(3), rel_tol=0.05)
    assert not embedding.A.any()
    assert math.isclose(float(embedding.B.std()), 1, rel_tol=0.05)


# -- Hugging Face PEFT with the same numbers


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rank": 2, "alpha": 3.0}, {"r": 2, "lora_alpha": 3}),
        ({"rank": 4, "alpha": 3.0, "rank_stabilised": True}, {"r": 4, "lora_alpha": 3, "use_rslora": True}),
        (
            {"rank": 2, "rank_pattern": {"conv": 3, "first": 1}, "alpha_pattern": {"second": 5.0}},
            {"r": 2, "lora_alpha": 16, "rank_pattern": {"conv": 3, "first": 1}, "alpha_pattern": {"second": 5}},
        ),
    ],
    ids=["plain", "rank_stabilised", "patterns"],
)
def test_outputs_and_gradients_are_those_of_peft(ours: dict[str, Any], theirs: dict[str, Any]):
    peft = pytest.importorskip("peft")
    model, adapters = adapted(ours)
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=list(SHAPES), **theirs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it finds out by itself
        other = peft.get_peft_model(Net(), config).eval()
    layers = {name: other.get_submodule(f"base_model.model.{name}") for name in SHAPES}
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        if name == "embed":
            tensors[name] = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            tensors[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    parts = adapters.parts("style")
    with torch.no_grad():
        for name, (A, B) in tensors.items():
            A.copy_(parts[name].A.view(A.shape))
            B.copy_(parts[name].B.view(B.shape))
    inputs = batch()
    running, expected = model(**inputs), other(**inputs)
    torch.testing.assert_close(running, expected, rtol=1e-5, atol=1e-5)
    running.square().sum().backward()
    expected.square().sum().backward()
    for name, (A, B) in tensors.items():
        torch.testing.assert_close(parts[name].A.grad.view(A.shape), A.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[name].B.grad.view(B.shape), B.grad, rtol=1e-4, atol=1e-5)


# -- dropout


@pytest.mark.parametrize("dropout_on", ["elements", "features"])
@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_dropout_acts_on_the_adapter_alone_only_while_training_and_keeps_the_mean(kind: str, dropout_on: str):
    layer = {"linear": nn.Linear(64, 5), "conv": nn.Conv2d(16, 5, 2), "conv1d": Conv1D(5, 64)}[kind]
    adapters = attach(model := nn.Sequential(layer), LoRA(rank=4, dropout=0.5, dropout_on=dropout_on))
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_()
    x = torch.ones(8, 16, 3, 3) if kind == "conv" else torch.ones(8, 64)
    adapters.activate(None)
    base = model.train()(x)
    adapters.activate("default")
    full = model.eval()(x)
    model.train()
    runs = torch.stack([model(x).detach() for _ in range(2000)])
    assert not torch.equal(runs[0], runs[1])
    error = (runs.mean(0) - full).norm() / (full - base).norm()
    assert error < 0.15
    rows_differ = not torch.allclose(runs[0][0], runs[0][1])
    assert rows_differ == (dropout_on == "elements")


def test_dropout_on_elements_drops_each_with_its_probability_and_features_drop_in_all_rows():
    model = nn.Sequential(nn.Linear(50, 50, bias=False)).train()
    nn.init.zeros_(model[0].weight)
    adapters = attach(model, LoRA(rank=50, alpha=50.0, dropout=0.3))
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(torch.eye(50))
    out = model(torch.ones(200, 50))  # the mask itself
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.7]), rtol=1e-4, atol=0)
    assert abs(float((out == 0).float().mean()) - 0.3) < 0.02
    adapters.parts("default")["0"].dropout_on = "features"
    out = model(torch.ones(200, 50))
    assert torch.equal(out, out[:1].expand(200, 50))
    assert 0 < int((out[0] == 0).sum()) < 50


def test_dropout_leaves_indices_of_an_embedding_alone():
    adapters = attach(model := nn.Sequential(nn.Embedding(7, 4)), LoRA(rank=2, dropout=0.5))
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_()
    ids = torch.arange(7)
    assert torch.equal(model.train()(ids), model.eval()(ids))


# -- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank_pattern": {"*": -1}}, "rank is -1"),
        ({"alpha": math.nan}, "alpha is nan; it must be a finite number"),
        ({"alpha_pattern": {"*": math.inf}}, "alpha is inf"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout_on": "rows"}, 'dropout_on is "rows"; it is one of elements, features'),
    ],
    ids=repr,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        LoRA(**settings)


def test_it_acts_on_every_layer_with_a_matrix_and_on_no_other():
    for layer in (nn.Linear(3, 5), Conv1D(3, 5), nn.Conv1d(2, 3, 2), nn.Conv3d(2, 3, 2), nn.Embedding(3, 5)):
        (part,) = attach(layer, LoRA(targets="")).parts("default").values()
        assert isinstance(part, LoRAAdapter)
    for layer in (nn.LayerNorm(3), nn.ReLU()):
        with pytest.raises(TargetError, match="lora"):
            attach(layer, LoRA(targets=""))


def test_the_fused_pass_and_the_plain_formula_agree():
    """Beside another adapter the fused pass is not taken."""
    model, adapters = adapted({"rank": 2})
    x = torch.randn(4, 5)
    fused = model.first(x)
    part = adapters.parts("style")["first"]
    torch.testing.assert_close(fused, F.linear(x, model.first.weight, model.first.bias) + part.delta(x))
