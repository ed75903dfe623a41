"""Head: a module trained whole, as a copy; the base keeps its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import Head, LoRA, Rows, Stack, Targets, attach
from smidgen.core.errors import MergeError, NotMergeable, TargetError


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def perturb(adapters: Any) -> None:
    with torch.no_grad():
        for p in adapters.parameters(*adapters.names):
            p.add_(torch.randn_like(p))


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_by_itself_it_is_a_linear_probe_of_the_last_layer():
    model = body()
    adapters = attach(model, Head())
    assert [site.name for site in adapters.sites("default")] == ["2"]
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 5 + 2
    base = body()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "smidgen" not in k})
    assert torch.equal(model(X), base(X))
    model(X).square().sum().backward()
    base(X).square().sum().backward()
    part = adapters.parts("default")["2"].module
    assert torch.equal(part.weight.grad, base[2].weight.grad)
    assert torch.equal(part.bias.grad, base[2].bias.grad)


def test_it_takes_the_head_of_a_transformers_model():
    import transformers

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    adapters = attach(transformers.BertForSequenceClassification(config), Head())
    assert [name for name, _ in adapters.named_parameters()] == ["classifier.module.weight", "classifier.module.bias"]
    assert sum(p.numel() for p in adapters.parameters()) == 3 * 4 + 3


def test_it_computes_what_the_layer_would_with_its_values():
    model = body()
    adapters = attach(model, Head(targets=["0", "2"]))
    perturb(adapters)
    one, two = (adapters.parts("default")[name].module for name in ("0", "2"))
    torch.testing.assert_close(model(X), torch.tanh(X @ one.weight.T + one.bias) @ two.weight.T + two.bias)


def test_on_a_16_bit_base_it_learns_in_fp32_and_computes_in_the_bases_dtype():
    model = body().bfloat16()
    adapters = attach(model, Head())
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in adapters.parameters()} == {torch.float32}


def test_every_module_below_a_target_that_has_parameters_is_copied():
    model = nn.ModuleDict({"body": nn.Linear(3, 5), "head": nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.LayerNorm(5))})
    adapters = attach(model, LoRA(targets="body", heads="head"), "style")
    assert [site.name for site in adapters.sites("style")] == ["body", "head.0", "head.2"]


class Nested(nn.Module):
    """As the language-model heads of BERT: a module with a parameter of its own and layers below."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.bias = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.bias


def test_a_module_with_parameters_and_layers_trains_all_of_them_once():
    model = nn.Sequential(nn.Linear(3, 3), Nested())
    adapters = attach(model, LoRA(targets="0", heads=("1",)), "style")
    heads = {name for name, _ in adapters.named_parameters() if "module" in name}
    assert heads == {"1.module.bias", "1.dense.module.weight", "1.dense.module.bias"}
    perturb(adapters)
    model(X).sum().backward()
    adapters.check_gradients()


def test_a_batch_norm_brings_its_running_statistics_and_leaves_the_bases_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    before = {key: value.clone() for key, value in model[1].state_dict().items()}
    adapters = attach(model, Head(targets="1"))
    model.train()(torch.randn(8, 3) + 3)
    own = adapters.parts("default")["1"].module
    assert own.num_batches_tracked == 1
    assert own.running_mean.any()
    model.eval()
    running = model(X)
    expected = nn.functional.batch_norm(model[0](X), own.running_mean, own.running_var, own.weight, own.bias)
    torch.testing.assert_close(running, expected)
    adapters.activate(None)
    adapters.detach()
    assert all(torch.equal(value, before[key]) for key, value in model[1].state_dict().items())


def test_a_batch_norm_whose_statistics_moved_is_not_merged():
    """Merging writes weight and bias; the statistics would be lost."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    adapters = attach(model, Head(targets="1"))
    model.train()(torch.randn(8, 3) + 3)
    with pytest.raises(MergeError, match="differs from the running one"):
        adapters.merge()


def test_a_head_of_tied_weights_changes_the_head_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.tokens(ids))

    model, ids = Tied(), torch.arange(7)
    adapters = attach(model, Head(targets="head"))
    perturb(adapters)
    own = adapters.parts("default")["head"].module.weight
    torch.testing.assert_close(model(ids), model.tokens(ids) @ own.T)


def test_it_stands_in_the_layers_place_whatever_acts_below():
    model = body()
    adapters = attach(model, LoRA(rank=2, targets="2"), "below")
    adapters.add(Head(targets="2"), "head")
    perturb(adapters)
    adapters.activate("head")
    alone = model(X)
    adapters.activate(Stack("below", "head"))
    assert torch.equal(model(X), alone)
    adapters.merge(Stack("below", "head"))
    torch.testing.assert_close(model(X), alone)


def test_lora_over_a_head_changes_the_heads_output():
    model = body()
    adapters = attach(model, Head(targets="2"), "head")
    adapters.add(LoRA(rank=2, targets="2"), "above")
    perturb(adapters)
    adapters.activate(Stack("head", "above"))
    part, own = adapters.parts("above")["2"], adapters.parts("head")["2"].module
    hidden = torch.tanh(model[0](X))
    torch.testing.assert_close(model(X), hidden @ own.weight.T + own.bias + part.delta(hidden))


def test_a_whole_module_mixes_rows_by_running_them_apart_and_does_not_merge():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    model, x = Attends(), torch.randn(2, 3, 4)
    adapters = attach(model, Head(targets="attn"))
    perturb(adapters)
    assert {name for name, _ in adapters.named_parameters()} == {
        "attn.module.in_proj_weight",
        "attn.module.in_proj_bias",
    }
    full = model(x)
    adapters.activate(Rows("default", None))
    mixed = model(x)
    adapters.activate(None)
    torch.testing.assert_close(mixed, torch.stack((full[0], model(x)[1])))
    with pytest.raises(NotMergeable):
        adapters.merge("default")


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (Targets("1"), "Tanh has no parameters of its own"),
    ],
)
def test_what_has_nothing_to_train_whole_is_refused(targets: Targets, text: str):
    with pytest.raises(TargetError, match=text):
        attach(body(), Head(targets=targets))


def test_a_quantised_layer_is_no_head():
    model = body()
    model[2].weight = nn.Parameter(torch.ones(2, 5, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"2: a weight held as .* cannot be trained whole"):
        attach(model, Head(targets="2"))
    with pytest.raises(TargetError, match=r"heads=\('2',\) cannot be trained\. 2: a weight held as"):
        attach(model, LoRA(targets="0", heads=("2",)))
    assert type(model[0]) is nn.Linear


def test_a_single_parameter_can_be_a_head_beside_another_method():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, before = torch.randn(4, 3), model(torch.zeros(1, 3))
    adapters = attach(model, LoRA(rank=2, targets="0", heads=("2.bias",)))
    assert [site.name for site in adapters.sites("default")] == ["0", "2.bias"]
    with torch.no_grad():
        adapters.parts("default")["2.bias"].value += 1
    assert torch.allclose(model(torch.zeros(1, 3)), before + 1)
    running = model(x)
    adapters.merge()
    assert torch.allclose(model(x), running, atol=1e-6)


def test_a_pattern_that_names_modules_trains_these_whole_and_not_their_parameters_one_by_one():
    model = nn.ModuleDict({"body": nn.Linear(3, 5), "classifier": nn.Linear(5, 2)})
    adapters = attach(model, LoRA(rank=2, targets="body", heads=("classifier*",)))
    assert [site.name for site in adapters.sites("default")] == ["body", "classifier"]
