"""IA3: numbers by the paper's formula in float64, and equal to Hugging Face PEFT on every architecture it knows."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.adapters import AdapterSet
from smidgen.core.blocks import feedforwards
from smidgen.core.composition import Rows, Weighted
from smidgen.core.errors import TargetError
from smidgen.core.site import Site
from smidgen.core.targets import Targets
from smidgen.methods.ia3 import IA3

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
BERT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = BERT | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 4, "vocab_size": 99}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Bert", "Roberta", "Deberta", "DebertaV2", "GPTNeoX", "Falcon", "Phi"), BERT),
    **dict.fromkeys(("Llama", "Mistral", "Mixtral", "Gemma", "Gemma2", "Qwen2", "Qwen3"), GROUPED),
    "GPT2": GPT | {"add_cross_attention": True},
    "GPTBigCode": GPT,
    "GPTJ": GPT | {"rotary_dim": 8},
    "GPTNeo": {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]} | BERT,
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32} | BERT,
    "Bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99, "pad_token_id": 0},
    "T5": T5 | {"feed_forward_proj": "gated-gelu"},
    "MT5": T5,
}


def tiny(family: str) -> Any:
    settings = {k: v for k, v in SETTINGS[family].items() if k != "num_hidden_layers" or family != "GPTNeo"}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}Model")(config).eval().requires_grad_(False)


def stir(adapters: AdapterSet) -> None:
    with torch.no_grad():
        for name in adapters.names:
            for parameter in adapters.parameters(name):
                parameter.copy_(1 + 0.5 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", SETTINGS)
def test_sites_shapes_and_outputs_are_those_of_hugging_face_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny(family)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.IA3Config())
    adapters = attach(model, IA3())
    stir(adapters)
    ours = {f"base_model.model.{name}": part for name, part in adapters.parts("default").items()}
    with torch.no_grad():
        found = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "ia3_l")}
        assert found.keys() == ours.keys()
        for name, layer in found.items():
            assert layer.ia3_l["default"].shape == ours[name].l.shape
            layer.ia3_l["default"].copy_(ours[name].l)
        inputs = {"input_ids": torch.randint(3, 99, (2, 5))}
        if "T5" in family:
            inputs["decoder_input_ids"] = torch.randint(3, 99, (2, 5))
        if family == "GPT2":
            inputs["encoder_hidden_states"] = torch.randn(2, 3, 32)
        torch.testing.assert_close(model(**inputs)[0], theirs(**inputs)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family in SETTINGS if family != "Mixtral"])
def test_the_names_of_feedforward_outputs_are_the_ones_that_blocks_finds(family: str) -> None:
    model = tiny(family)
    parts = feedforwards(model)
    assert parts
    for part in parts:
        assert IA3().scales_input(Site.at(part.output, model.get_submodule(part.output)))


def test_outputs_are_scaled_by_the_formula_and_merge_into_weight_and_bias() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(2, 3)
    model = nn.Sequential(layer)
    assert torch.equal(model(x), layer(x))
    adapters = attach(model, IA3(targets="0"))
    stir(adapters)
    scale = adapters.parameters()[0].double().flatten()
    expected = scale * (x.double() @ layer.weight.double().T + layer.bias.double())
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-6)
    adapters.merge()
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_inputs_are_scaled_by_the_formula_and_merge_into_columns() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(2, 3)
    model = nn.Sequential(layer)
    adapters = attach(model, IA3(targets="0", feedforward="0"))
    stir(adapters)
    scale = adapters.parameters()[0].double()
    assert scale.shape == (1, 3)
    expected = (scale * x.double()) @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-6)
    adapters.merge()
    torch.testing.assert_close(model(x).double(), expected, atol=1e-6, rtol=1e-6)


LAYERS = {
    "linear": lambda: (nn.Linear(3, 5), torch.randn(2, 3), (5, 1), (1, 3)),
    "conv1d-transposed": lambda: (transformers.pytorch_utils.Conv1D(5, 3), torch.randn(2, 3), (5, 1), (1, 3)),
    "conv": lambda: (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5), (1, 6, 1, 1), (1, 4, 1, 1)),
    "grouped conv": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), (1, 6, 1, 1), (1, 4, 1, 1)),
    "embedding": lambda: (nn.Embedding(7, 5), torch.randint(7, (2, 4)), (5, 1), None),
    "norm": lambda: (nn.LayerNorm(5), torch.randn(2, 3, 5), (5, 1), None),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("side", ["output", "input"])
def test_it_starts_as_the_base_and_merges_on_every_layer_that_it_takes(kind: str, side: str) -> None:
    layer, x, *shapes = LAYERS[kind]()
    shape = shapes[side == "input"]
    method = IA3(targets="0", feedforward="0" if side == "input" else ())
    model = nn.Sequential(layer)
    base = model(x)
    if shape is None:
        with pytest.raises(TargetError, match="cannot be scaled"):
            attach(model, method)
        return
    adapters = attach(model, method)
    assert torch.equal(model(x), base)
    assert [tuple(p.shape) for p in adapters.parameters()] == [shape]
    stir(adapters)
    running = model(x)
    assert not torch.allclose(running, base)
    adapters.merge()
    torch.testing.assert_close(model(x), running, atol=1e-5, rtol=1e-5)


def test_compositions_are_what_they_say() -> None:
    model, x = tiny("Bert"), torch.randint(3, 99, (3, 5))
    adapters = attach(model, IA3(), name="a").add(IA3(), name="b")
    stir(adapters)
    alone = {}
    for name in ("a", "b", None):
        adapters.activate(name)
        alone[name] = model(x)[0]
    adapters.activate(Rows("b", None, "a"))
    expected = torch.stack([alone["b"][0], alone[None][1], alone["a"][2]])
    torch.testing.assert_close(model(x)[0], expected, atol=1e-5, rtol=1e-5)
    adapters.activate(Weighted(a=1.0, b=0.0))
    torch.testing.assert_close(model(x)[0], alone["a"], atol=1e-5, rtol=1e-5)


def test_it_computes_in_the_dtype_of_the_base() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).bfloat16()
    adapters = attach(model, IA3(targets=["0", "1"], feedforward="1"))
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    assert model(torch.randn(2, 3).bfloat16()).dtype == torch.bfloat16


def test_a_scale_that_16_bits_cannot_hold_is_right_on_average() -> None:
    layer, x = nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.rand(1000, 8).bfloat16()  # bf16(1.011) is 1.0078
    base = layer(x).double()
    adapters = attach(layer, IA3(targets="0"))
    with torch.no_grad():
        adapters.parameters()[0].fill_(1.011)
        assert (layer(x).double() * base).sum() / base.square().sum() == pytest.approx(1.011, abs=5e-4)


def test_a_parameter_that_no_call_reads_is_scaled_in_its_rows() -> None:
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)
    model = nn.ModuleDict({"attention": attention})
    adapters = attach(model, IA3(targets=Targets("attention").parameter("in_proj_weight", "in_proj_bias")))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 3 * 4
    stir(adapters)
    running = attention(x, x, x)[0]
    adapters.merge()
    torch.testing.assert_close(attention(x, x, x)[0], running)


def test_torchs_attention_is_left_out_with_the_reason_and_unknown_models_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    adapters = attach(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), IA3())
    assert [site.path for site in adapters.sites("default")] == ["layers.0.linear2"]
    assert "left out layers.0.self_attn: its keys and values are computed without a call" in adapters.report()
    with pytest.raises(TargetError, match="no attention or feed-forward is recognised in Sequential"):
        attach(nn.Sequential(nn.Linear(3, 3)), IA3())


def test_the_rows_of_a_mixed_batch_share_one_call_of_the_base() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    adapters = attach(model, IA3(targets=["0", "1"], feedforward=("1",)), "a")
    adapters.add(IA3(targets=["0", "1"], feedforward=("0",)), "b")  # the other sides
    with torch.no_grad():
        for parameter in adapters.parameters("a", "b"):
            parameter.uniform_(0.5, 1.5)
    a, b = ({site: part.l.flatten() for site, part in adapters.parts(name).items()} for name in "ab")
    rows = torch.randn(6, 4, 3)
    seen: list[int] = []
    own = nn.Linear.forward

    def counting(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return own(layer, x)

    adapters.activate(Rows("b", None, "a"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counting)
        out = model(rows)
    assert seen == [6, 6]
    (W0, b0), (W1, b1) = ((layer.weight, layer.bias) for layer in (model[0], model[1]))
    first = ((rows[:2] * b["0"]) @ W0.T + b0) @ W1.T * b["1"] + b1 * b["1"]
    last = (a["0"] * (rows[4:] @ W0.T + b0) * a["1"]) @ W1.T + b1
    torch.testing.assert_close(out, torch.cat([first, rows[2:4] @ W0.T @ W1.T + b0 @ W1.T + b1, last]))


def test_the_backward_by_hand_is_that_of_the_formula():
    x, l = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 1, dtype=torch.float64)
    part = next(iter(attach(nn.Linear(5, 3).double(), IA3(targets="", feedforward=())).parts("default").values()))
    part.l.data.copy_(l)
    torch.testing.assert_close(part.scaled(x), x * l.flatten())
    assert torch.autograd.gradcheck(lambda x, _: part.scaled(x), (x, part.l))
    assert torch.autograd.gradgradcheck(lambda x, _: part.scaled(x), (x, part.l))
