"""Lean modules: the output of the module's own forward to the last bit, its gradients, and less kept for backward."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smidgen import DoRA, LNTuning, LoRA, Stack, Targets, VeRA, attach
from smidgen.core.lean import put_on, take_off
from smidgen.core.method import Method
from smidgen.core.quantised import format_named
from smidgen.core.quantised_linear import quantise_

from ..laws.snapshots import everything, same

WIDTH, HIDDEN = 6, 10


class Norm(nn.Module):
    """An RMSNorm as transformers' Llama has it; Gemma's adds its weight to one."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.shift, self.eps = shift, 1e-3

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight + self.shift) * wide.to(x.dtype)


class Centred(Norm):
    """What looks like an RMSNorm and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpGated(Gated):
    """Its activation stands on the other half."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Dropped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


def body(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    parts = parts or (Norm(), Gated(), Norm(1.0), Plain(), nn.RMSNorm(WIDTH, eps=1e-3))
    return nn.Sequential(*(copy.deepcopy(part) for part in parts))


def moved(model: nn.Module, method: Method) -> list[nn.Parameter]:
    parameters = attach(model, method, seed=0).parameters()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return parameters


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def results(model: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *parameters])]


def both(method: Method, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a model, plain and lean."""
    found = []
    for is_lean in (False, True):
        model = body().to(dtype).train()
        parameters = moved(model, method)
        if is_lean:
            assert put_on(model) == ["0", "1", "2", "3", "4"]
        found.append(results(model, parameters, batch(dtype)))
    return found[0], found[1]


EVERYWHERE = ("*.gate_proj", "*.up_proj", "*.down_proj", "*.fc1", "*.fc2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, targets=EVERYWHERE),
        LoRA(rank=2, dropout=0.3, targets=EVERYWHERE),
        LoRA(rank=2, dropout=0.3, dropout_on="features", targets=EVERYWHERE),
        LoRA(rank=2, targets="*.gate_proj"),
        LoRA(rank=2, bias_on_B=True, targets="*.fc2"),
        DoRA(rank=2, targets=EVERYWHERE),
        VeRA(rank=2, targets="*.down_proj"),
    ],
    ids=["lora", "dropout", "dropout_on_features", "gate_alone", "bias_on_B", "dora", "vera"],
)
def test_the_output_is_the_same_to_the_last_bit_and_gradients_are_right(method: Method, dtype: torch.dtype):
    plain, lean = both(method, dtype)
    assert torch.equal(plain[0], lean[0])
    for one, other in zip(plain[1:], lean[1:], strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 0.1) * one.norm()


class Shifted(nn.RMSNorm):
    """Gemma's, in fp64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (WIDTH,), 1 + self.weight, self.eps)


@pytest.mark.parametrize("part", [nn.RMSNorm(WIDTH, eps=1e-3), Shifted(WIDTH, eps=1e-3), Gated(), Plain()], ids=str)
def test_first_and_second_derivatives_pass_gradcheck(part: nn.Module):
    model = nn.Sequential(part).double().requires_grad_(False)
    assert put_on(model) == ["0"]
    assert torch.autograd.gradcheck(model, batch(torch.float64))
    assert torch.autograd.gradgradcheck(model, batch(torch.float64))


@pytest.mark.parametrize("rank_trains", [True, False], ids=["factors_train", "factors_fixed"])
def test_first_and_second_derivatives_pass_gradcheck_through_an_adapted_output_layer(rank_trains: bool):
    model = nn.Sequential(Gated()).double()
    parameters = moved(model, LoRA(rank=2, targets=("*.gate_proj", "*.down_proj")))
    for parameter in parameters:
        parameter.requires_grad_(rank_trains)
    put_on(model)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return model(x)

    inputs = (batch(torch.float64), *(parameters if rank_trains else ()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_module_that_only_looks_like_one_is_left_alone():
    class Clipped(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(max=0.1)

    class Dropping(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner = F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.1, self.training)
            return self.down_proj(inner)

    model = body(Centred(), UpGated(), Clipped(), Dropping(), nn.LayerNorm(WIDTH)).requires_grad_(False)
    before = [type(part) for part in model]
    state = torch.get_rng_state()
    assert put_on(model) == []
    assert [type(part) for part in model] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_patches_trained_norms_and_norms_with_adapters_are_left_alone():
    model = body(Norm(), Norm(), Norm(), Norm()).requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: None)
    model[1].forward = model[1].forward
    model[2].weight.requires_grad_(True)
    attach(model, LNTuning(targets="3"))
    model[2].weight.requires_grad_(True)  # after attach, which froze it
    assert put_on(model) == []


def test_a_norm_that_is_trained_later_runs_its_own_forward_and_gets_its_gradient():
    model = body(Norm()).requires_grad_(False)
    assert put_on(model) == ["0"]
    model[0].weight.requires_grad_(True)
    model(batch()).sum().backward()
    assert model[0].weight.grad is not None


def test_a_class_that_is_patched_later_is_followed(monkeypatch: pytest.MonkeyPatch):
    model = body(Norm(), Gated()).requires_grad_(False)
    assert put_on(model) == ["0", "1"]
    for kind in (Norm, Gated):
        monkeypatch.setattr(kind, "forward", lambda self, x: x + 1)
    x = batch()
    assert torch.equal(model(x), x + 1 + 1)


def test_a_dropout_that_dropped_nothing_and_drops_later_is_followed():
    model = body(Dropped()).requires_grad_(False)
    assert put_on(model) == ["0"]
    model[0].drop.p = 1.0
    assert torch.equal(model(batch()), model[0].fc2.bias.expand(2, 4, WIDTH))


def test_an_adapter_put_on_a_lean_norm_acts_and_taking_it_off_gives_the_own_class_back():
    model = body(Norm()).requires_grad_(False)
    put_on(model)
    adapters = attach(model, LNTuning(targets="0"))
    model(batch()).sum().backward()
    adapters.check_gradients()
    adapters.detach()
    assert type(model[0]) is Norm


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_lean_and_do_the_same(copied: Callable[[nn.Module], nn.Module]):
    model = body()
    parameters = moved(model, LoRA(rank=2, targets=EVERYWHERE))
    put_on(model)
    other = copied(model)
    assert [type(part) for part in other] == [type(part) for part in model]
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = [other.get_parameter(names[id(p)]) for p in parameters]
    for one, two in zip(results(model, parameters, batch()), results(other, theirs, batch()), strict=True):
        assert torch.equal(one, two)


def test_it_keeps_names_and_keys_and_detaching_restores_every_bit():
    model = body()
    before = everything(model)
    adapters = attach(model, LoRA(rank=2, targets=EVERYWHERE), seed=0)
    keys = list(model.state_dict())
    assert adapters.lean() == ["0", "1", "2", "3", "4"]
    assert adapters.lean() == ["0", "1", "2", "3", "4"]
    assert list(model.state_dict()) == keys
    assert [type(part).__name__ for part in model] == ["Norm", "Gated", "Norm", "Plain", "RMSNorm"]
    assert isinstance(model[1], Gated)
    adapters.detach()
    assert same(everything(model), before)


def test_taking_off_gives_back_the_classes():
    model = body().requires_grad_(False)
    put_on(model)
    take_off(model)
    assert [type(part) for part in model] == [Norm, Gated, Norm, Plain, nn.RMSNorm]


def test_switching_composing_and_hooks_on_the_output_layer_are_followed():
    plain, lean = body(), body()
    for model in (plain, lean):
        adapters = attach(model, LoRA(rank=2, targets=EVERYWHERE), "a", seed=0)
        adapters.add(LoRA(rank=1, targets=EVERYWHERE), "b", seed=1)
        with torch.no_grad():
            for name in ("a", "b"):
                for parameter in adapters.parameters(name):
                    parameter.fill_(0.1)
        model.seen = []
        if model is lean:
            adapters.lean()
        for expression in (Stack("a", "b"), None, "b"):
            adapters.activate(expression)
            model.seen.append(model(batch()).detach())
        handle = model[1].down_proj.register_forward_hook(lambda module, args, output: output + args[0].sum())
        model.seen.append(model(batch()).detach())
        handle.remove()
    assert all(map(torch.equal, plain.seen, lean.seen))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    found = []
    for is_checkpointed in (False, True):
        model = body().train()
        parameters = moved(model, LoRA(rank=2, dropout=0.3, targets=EVERYWHERE))
        put_on(model)
        torch.manual_seed(3)
        y = checkpoint(model, batch(), use_reentrant=reentrant) if is_checkpointed else model(batch())
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in parameters)])
    assert all(map(torch.equal, *found))


def test_autocast_gives_the_same():
    found = []
    for is_lean in (False, True):
        model = body(Norm(), Gated(), Plain())
        parameters = moved(model, LoRA(rank=2, targets=EVERYWHERE))
        if is_lean:
            put_on(model)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(batch())
        found.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), parameters)])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.03 * one.norm()


def test_compiling_has_no_graph_break_and_the_meta_device_is_left_alone():
    model = body()
    parameters = moved(model, LoRA(rank=2, targets=EVERYWHERE))
    plain = results(model, parameters, batch())
    put_on(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for one, other in zip(plain, results(compiled, parameters, batch()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    with torch.device("meta"):
        assert put_on(nn.Sequential(Norm()).requires_grad_(False)) == []


def kept(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """What is kept for backward beside parameters, by storage."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found["y"] = model(x)
    del found["y"]
    return found


def test_a_lean_norm_keeps_its_input_and_nothing_else():
    model = body(Norm()).bfloat16().requires_grad_(False)
    put_on(model)
    x = batch(torch.bfloat16)
    assert list(kept(model, x)) == [x.untyped_storage().data_ptr()]


def test_a_lean_gated_feedforward_keeps_its_two_halves_and_the_small_products():
    model = nn.Sequential(Gated())
    moved(model, LoRA(rank=2, targets="*_proj"))
    put_on(model)
    x = batch()
    shapes = sorted(tuple(tensor.shape) for tensor in kept(model, x).values())
    # x, what A makes of it twice and of the product once, gate and up
    assert shapes == sorted([(2, 4, WIDTH), *[(8, 2)] * 3, *[(2, 4, HIDDEN)] * 2])


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("part", [Gated, Plain])
@pytest.mark.parametrize("dropout", [{}, {"dropout": 0.3}, {"dropout": 0.3, "dropout_on": "features"}], ids=str)
def test_on_weights_in_few_bits_it_keeps_no_product_either_and_gradients_are_the_same(
    part: type[nn.Module], format: str, dropout: dict[str, Any]
):
    results = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(part())
        for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            quantise_(module, format_named(format))
        parameters = moved(model, LoRA(rank=2, targets=Targets.of_type(nn.Linear), **dropout))
        if lean:
            assert put_on(model) == ["0"]
        x = batch()
        shapes = [tuple(tensor.shape) for tensor in kept(model, x).values()]
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=False) if lean else model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *parameters])))
        assert shapes.count((2, 4, HIDDEN)) == (2 if part is Gated else 1) + (0 if lean else 2 if part is Gated else 1)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_nothing_below_the_lowest_trained_layer_is_recorded_or_kept():
    below, above = body(Norm(), Gated()), body(Norm(), Gated())
    model = nn.Sequential(below, above)
    adapters = attach(model, LoRA(rank=2, targets="1.1.down_proj"), seed=0)
    for _ in range(2):
        x = torch.randn(2, 4, WIDTH)
        outputs: list[Tensor] = []
        handle = above[0].register_forward_hook(lambda module, args, output, seen=outputs: seen.append(output))
        found = kept(model, x)
        handle.remove()
        assert [y.requires_grad for y in outputs] == [False]  # so autograd has no node below
        # the input of the one layer, and what A makes of it
        assert sorted(tuple(tensor.shape) for tensor in found.values()) == [(2, 4, HIDDEN), (8, 2)]
        adapters.lean()
