"""The mechanism: what others may have done to a layer before us, and what must not bypass an adapter."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from smidgen import Head, LoRA, Rows, Targets, attach
from smidgen.core.attach import adapted, bare_call, replaced
from smidgen.methods.lora import LoRAAdapter


def perturb(adapters) -> None:
    with torch.no_grad():
        for p in adapters.parameters(*adapters.names):
            p.add_(torch.randn_like(p))


def delta(layer: nn.Linear, x: Tensor, name: str = "default") -> Tensor:
    adapter = layer.smidgen.get(name)
    return adapter.scale * x @ adapter.A.T @ adapter.B.T


def test_the_class_keeps_its_name_its_signature_and_says_which_adapters_are_there():
    model = nn.Sequential(nn.Linear(3, 5))
    attach(model, LoRA(rank=2), "style")
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    assert (type(layer).__name__, type(layer).__module__) == ("Linear", "torch.nn.modules.linear")
    assert inspect.signature(layer.forward) == inspect.signature(nn.Linear(3, 5).forward)
    assert "adapters=(style: LoRAAdapter)" in repr(layer)
    assert adapted(nn.Linear) is type(layer)  # one class for all layers of a class


def test_an_accelerate_style_patched_forward_runs_inside_ours_and_is_given_back():
    model = nn.Sequential(nn.Linear(3, 5))
    layer, calls = model[0], []

    def patched(old, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return old(x) * 2

    layer.forward = functools.partial(patched, layer.forward)
    mine = layer.forward
    x, base = torch.randn(4, 3), nn.functional.linear
    adapters = attach(model, LoRA(rank=2))
    perturb(adapters)
    torch.testing.assert_close(model(x), 2 * base(x, layer.weight, layer.bias) + delta(layer, x))
    assert calls == [(4, 3)]
    adapters.detach()
    assert layer.forward is mine


def test_accelerates_own_hooks_keep_running():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    layer = nn.Linear(3, 5)
    hooks.add_hook_to_module(layer, Doubling())
    x, model = torch.randn(4, 3), nn.Sequential(layer)
    base = model(x)
    adapters = attach(model, LoRA(rank=2))
    perturb(adapters)
    torch.testing.assert_close(model(x), base + delta(layer, x))
    adapters.activate(None)
    assert torch.equal(model(x), base)
    head = adapters.add(Head(targets="0"), "head")
    perturb(head)
    head.activate("head")
    own = layer.smidgen.get("head").module
    torch.testing.assert_close(model(x), 2 * (x @ own.weight.T + own.bias))


def test_a_class_whose_forward_is_patched_later_is_followed(monkeypatch: pytest.MonkeyPatch):
    class Layer(nn.Linear):
        pass

    model = nn.Sequential(Layer(3, 5))
    attach(model, LoRA(rank=2))
    monkeypatch.setattr(Layer, "forward", lambda self, x: torch.zeros(len(x), 5), raising=False)
    assert not model(torch.randn(4, 3)).any()


def test_hooks_on_the_layer_stay_around_the_adapter():
    model = nn.Sequential(nn.Linear(3, 5))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    perturb(attach(model, LoRA(rank=2)))
    assert model(torch.randn(2, 3)) is seen[0]


def test_a_subclass_with_its_own_forward_is_called_and_not_replaced_by_the_fused_pass():
    class Clamped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).clamp(-0.1, 0.1)

    model = nn.Sequential(Clamped(3, 5))
    x = torch.randn(4, 3)
    base = model(x)
    perturb(attach(model, LoRA(rank=2)))
    torch.testing.assert_close(model(x), base + delta(model[0], x))


def test_a_base_that_somebody_unfreezes_gets_its_gradient():
    """The fused pass has none for the base; it must not hide that."""
    for name in ("weight", "bias"):
        model = nn.Sequential(nn.Linear(3, 5))
        adapters = attach(model, LoRA(rank=2))
        perturb(adapters)
        parameter = getattr(model[0], name).requires_grad_()
        model(torch.randn(4, 3)).sum().backward()
        assert parameter.grad.any()
        assert all(p.grad.any() for p in adapters.parameters())


def test_a_sequential_with_adapters_of_its_own_runs_counts_and_slices_what_it_did():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    children = list(model)
    adapters = attach(model, LoRA(rank=2, targets=Targets("0", "2").parameter("weight")))
    perturb(adapters)
    x = torch.randn(2, 3)
    full = model(x)
    with adapters.rows(["default", None]):  # parameters cannot differ by row: the model itself splits the batch
        mixed = model(x)
        assert list(model) == children
        assert len(model) == 3
        assert model[-1] is children[-1]
    torch.testing.assert_close(mixed[0], full[0])
    adapters.activate(None)
    torch.testing.assert_close(mixed[1], model(x)[1])
    assert type(model) is nn.Sequential


def test_rows_apart_leave_the_plans_as_they_were_after_an_error():
    model = nn.Sequential(nn.Linear(3, 5))
    adapters = attach(model, LoRA(rank=2, targets=Targets("0").parameter("weight")))
    perturb(adapters)
    adapters.activate(Rows("default", None))
    x = torch.randn(2, 3)
    before = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4))
    assert torch.equal(model(x), before)


def test_rows_apart_take_the_model_itself_for_a_site():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    adapters = attach(model, LoRA(rank=2, targets=Targets("").parameter("in_proj_weight")))
    perturb(adapters)
    x = torch.randn(2, 3, 4)
    full = model(x, x, x)[0]
    with adapters.rows(["default", None]):
        mixed = model(x, x, x)[0]
    adapters.activate(None)
    torch.testing.assert_close(mixed, torch.stack((full[0], model(x, x, x)[0][1])))


# -- code that would read the weights itself


def encoder(layers: int = 1) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=True).eval()


@pytest.mark.parametrize(
    "where", [Targets("*.linear1"), Targets("*.out_proj"), Targets("*.self_attn").parameter("in_proj_weight")]
)
def test_the_fused_path_of_an_encoder_layer_does_not_bypass_adapters(where: Targets):
    model = encoder()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        base = model(x)
    adapters = attach(model, LoRA(rank=2, targets=where))
    perturb(adapters)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    assert (expected - base).norm() > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_an_encoder_takes_a_padded_batch_in_eval_and_gets_its_nested_tensors_back():
    model = encoder(2)
    x, padding = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 2:] = True
    adapters = attach(model, LoRA(rank=2, targets="*.linear1"))
    perturb(adapters)
    with torch.no_grad():
        padded = model(x, src_key_padding_mask=padding)
        alone = model(x[:1, :2])
    torch.testing.assert_close(padded[:1, :2], alone)
    assert not model.use_nested_tensor
    adapters.detach()
    assert model.use_nested_tensor


def test_an_adapter_that_no_forward_reaches_is_found_before_the_first_step():
    from smidgen.core.errors import PreflightError

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x @ self.layer.weight)

    model = Reads()
    adapters = attach(model, LoRA(rank=2, targets=Targets.of_type(nn.Linear)))
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(PreflightError, match=r"2 adapter parameters got no gradient.*layer\.A, layer\.B"):
        adapters.check_gradients()


# -- details


def test_a_replaced_parameter_is_given_back_also_where_contexts_are_nested_or_fail():
    layer = nn.Linear(3, 5)
    own, one, two = layer.weight, torch.zeros(5, 3), torch.ones(5, 3)
    with replaced(layer, {"weight": one}):
        with replaced(layer, {"weight": two}):
            assert layer.weight is two
        assert layer.weight is one
    with pytest.raises(AttributeError), replaced(layer, {"weight": one, "no_such_part.weight": two}):
        pass
    assert layer.weight is own
    assert "weight" not in layer.__dict__


def test_the_bare_call_is_what_the_layer_does_without_adapters():
    layer = nn.Linear(3, 5)
    x = torch.randn(2, 3)
    base = layer(x)
    perturb(attach(layer, LoRA(rank=2)))
    assert torch.equal(bare_call(layer)(x), base)
    assert not torch.equal(layer(x), base)


def test_a_module_may_pickle_itself_its_own_way():
    import copy

    class Handles(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.handle = open(sys.executable, "rb")  # noqa: SIM115

        def __getstate__(self) -> dict:
            return {**self.__dict__, "handle": None}

    layer = Handles()
    attach(layer, LoRA(rank=2))
    assert copy.deepcopy(layer).handle is None
    layer.handle.close()


def test_moving_the_model_moves_its_adapters():
    model = nn.Sequential(nn.Linear(3, 5))
    adapters = attach(model, LoRA(rank=2))
    model.to("meta")
    assert {p.device.type for p in adapters.parameters()} == {"meta"}
    model.double()
    assert {p.dtype for p in adapters.parameters()} == {torch.float64}


def test_a_model_without_weights_can_be_adapted():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    adapters = attach(model, LoRA(rank=2), seed=0)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (3 + 5)
    assert {p.device.type for p in adapters.parameters()} == {"meta"}


def test_modes_of_the_adapters_follow_the_layer():
    model = nn.Sequential(nn.Linear(3, 5)).eval()
    attach(model, LoRA(rank=2, dropout=0.5))
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(isinstance(m, nn.Module) and m.training for m in model.modules() if isinstance(m, LoRAAdapter))


def test_importing_the_library_changes_nothing_of_torch():
    program = (
        "import torch; from torch import nn\n"
        "before = {c: dict(vars(c)) for c in (nn.Module, nn.Linear, torch.Tensor)}\n"
        "import smidgen\n"
        "assert all(dict(vars(c)) == was for c, was in before.items())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
