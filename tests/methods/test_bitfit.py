"""BitFit: the change of a bias is the change of the output, on every layer that has one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet
from smidgen.core.composition import Rows, Weighted
from smidgen.core.errors import TargetError
from smidgen.core.targets import Targets
from smidgen.methods.bitfit import BitFit

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


def bert(head: str = "Model") -> Any:
    return getattr(transformers, f"Bert{head}")(transformers.BertConfig(**BERT)).eval().requires_grad_(False)


def stir(adapters: AdapterSet) -> None:
    with torch.no_grad():
        for name in adapters.names:
            for parameter in adapters.parameters(name):
                parameter.normal_()


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(3, 5), torch.randn(4, 7, 3)),
    "conv1d-transposed": lambda: (transformers.pytorch_utils.Conv1D(5, 3), torch.randn(4, 3)),
    "conv1d": lambda: (nn.Conv1d(3, 5, 3), torch.randn(4, 3, 6)),
    "conv2d": lambda: (nn.Conv2d(3, 5, 3, stride=2), torch.randn(4, 3, 6, 6)),
    "layer norm": lambda: (nn.LayerNorm(5), torch.randn(4, 2, 5)),
    "batch norm": lambda: (nn.BatchNorm2d(5).eval(), torch.randn(4, 5, 2, 2)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_equals_the_layer_with_the_changed_bias_running_merged_and_in_mixed_rows(kind: str) -> None:
    layer, x = LAYERS[kind]()
    model, weights = nn.Sequential(layer), {name: p.clone() for name, p in layer.named_parameters()}
    base = model(x)
    adapters = attach(model, BitFit(targets="0"))
    assert torch.equal(model(x), base)
    stir(adapters)
    (change,) = adapters.parameters()
    assert change.shape == weights["bias"].shape
    double = {"bias": (weights["bias"] + change).double(), "weight": weights["weight"].double()}
    expected = torch.func.functional_call(LAYERS[kind]()[0].double().eval(), double, x.double())
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.bias, weights["bias"])
    adapters.activate(Rows("default", None, "default", None))
    torch.testing.assert_close(model(x)[[0, 2]].double(), expected[[0, 2]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(x)[[1, 3]], base[[1, 3]])
    adapters.activate(Weighted(default=0.5))
    torch.testing.assert_close(model(x).double(), (base.double() + expected) / 2, atol=1e-6, rtol=1e-5)
    adapters.merge("default")
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(layer.weight, weights["weight"])


def test_all_biases_of_the_body_are_taken_and_the_heads_are_not() -> None:
    model = bert("ForSequenceClassification")
    adapters = attach(model, BitFit())
    biases = {name: p for name, p in model.bert.named_parameters() if name.endswith("bias")}
    assert {f"{site.path}.bias" for site in adapters.sites("default")} == {f"bert.{name}" for name in biases}
    D, F, layers = 32, 48, 2  # query, key, value, two outputs and two norms of D, the feed-forward's inside of F
    assert sum(p.numel() for p in adapters.parameters()) == layers * (7 * D + F) + 2 * D  # + embedding norm and pooler
    assert "left out classifier: part of the head" in adapters.report()


def test_it_starts_as_the_base_every_bias_learns_and_merging_keeps_the_outputs() -> None:
    model, ids = bert(), torch.randint(3, 99, (2, 5))
    base = model(ids)[1]
    adapters = attach(model, BitFit())
    torch.testing.assert_close(model(ids)[1], base, atol=1e-6, rtol=1e-5)
    stir(adapters)
    running = model(ids)[1]
    running.square().sum().backward()
    adapters.check_gradients()
    adapters.merge()
    torch.testing.assert_close(model(ids)[1], running, atol=1e-5, rtol=1e-5)


def test_biases_that_attention_reads_without_a_call_learn_and_merge_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    base = model(x)
    adapters = attach(nn.ModuleDict({"body": model, "head": nn.Linear(8, 2)}), BitFit())
    names = {site.name if site.parameter else f"{site.name}.bias" for site in adapters.sites("default")}
    assert names == {f"body.{name}" for name in biases}
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-5)
    stir(adapters)
    running = model(x)
    running.square().sum().backward()
    adapters.check_gradients()
    adapters.merge()
    torch.testing.assert_close(model(x), running, atol=1e-5, rtol=1e-5)


def test_targets_choose_which_biases() -> None:
    adapters = attach(bert(), BitFit(targets=["*.query", "*.intermediate.dense"]))  # the paper's half
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (32 + 48)


def test_what_has_no_bias_is_refused() -> None:
    with pytest.raises(TargetError, match="this Linear has no bias"):
        attach(nn.Sequential(nn.Linear(3, 3, bias=False)), BitFit(targets="0"))
    with pytest.raises(TargetError, match="in_proj_weight is no vector"):
        attach(
            nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), BitFit(targets=Targets("a").parameter("in_proj_weight"))
        )
    with pytest.raises(TargetError, match="has no biases in its body"):
        attach(nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)), BitFit())


def test_what_heads_train_whole_is_left_to_them() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    adapters = attach(model, BitFit(heads=("1",)))
    assert [site.name for site in adapters.sites("default")] == ["0", "1"]
