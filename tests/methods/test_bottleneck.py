"""Bottleneck adapters: numbers by the papers' formula in float64, and where they sit in each model."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smidgen import attach
from smidgen.adapters import AdapterSet
from smidgen.core.composition import Rows, Stack, Weighted
from smidgen.core.errors import ConfigError, NotMergeable, TargetError
from smidgen.core.side_places import FirstLayer, leave_out
from smidgen.methods.bottleneck import Bottleneck

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
F64 = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}
F64["gelu_tanh"] = partial(nn.functional.gelu, approximate="tanh")


def bert(**settings: Any) -> Any:
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)
    return transformers.BertModel(config).eval()


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaModel(config).eval()


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 99, (rows, 5))


def stir(adapters: AdapterSet) -> None:
    """Give every adapter parameter a value, as training would."""
    with torch.no_grad():
        for name in adapters.names:
            for parameter in adapters.parameters(name):
                parameter.normal_(std=0.3)


class Block(nn.Module):
    """A feed-forward whose layers stand in the block itself, with its norm and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


@pytest.mark.parametrize("f", F64)
@pytest.mark.parametrize("bias", [True, False])
def test_after_a_layer_it_is_the_papers_formula(f: Any, bias: bool) -> None:
    layer, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(2, 7, 3)
    base = layer(x).double()
    adapters = attach(layer, Bottleneck(targets="0", width=2, non_linearity=f, scale=0.7, bias=bias))
    assert torch.equal(layer(x).double(), base)
    stir(adapters)
    part = {name.removeprefix("0.net."): p.double() for name, p in adapters.named_parameters()}
    h = F64[f](base @ part["down"].T + part.get("down_bias", 0))
    expected = base + 0.7 * (h @ part["up"].T + part.get("up_bias", 0))
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_beside_a_feedforward_in_one_module_it_reads_its_input() -> None:
    model, x = llama(), torch.randn(2, 7, 32)
    mlp = model.get_submodule("layers.1.mlp")
    base = mlp(x).double()
    adapters = attach(model, Bottleneck(placement="parallel", scale=4.0, reduction_factor=8))
    assert [site.path for site in adapters.sites("default")] == ["layers.0.mlp", "layers.1.mlp"]
    assert torch.equal(mlp(x).double(), base)
    stir(adapters)
    down, down_bias, up, up_bias = (p.double() for p in adapters.parts("default")["layers.1.mlp"].parameters())
    expected = base + 4.0 * (torch.relu(x.double() @ down.T + down_bias) @ up.T + up_bias)
    torch.testing.assert_close(mlp(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_beside_a_feedforward_of_two_layers_the_last_gets_what_the_first_read() -> None:
    block, x = Block(), torch.randn(2, 7, 6)
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    base = block(x).double()
    adapters = attach(model, Bottleneck(placement="parallel", scale=4.0, width=2))
    assert torch.equal(block(x).double(), base)
    stir(adapters)
    part = {name.removeprefix("layers.0."): p.double() for name, p in adapters.named_parameters()}
    h = torch.relu(block.norm(x).double() @ part["fc1.net.down"].T + part["fc1.net.down_bias"])
    expected = base + 4.0 * (h @ part["fc2.net.up"].T + part["fc2.net.up_bias"])
    torch.testing.assert_close(block(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("placement", "places"),
    [
        ("feedforward", ["output.dense"]),
        ("both", ["attention.output.dense", "output.dense"]),
        ("parallel", ["intermediate.dense", "output.dense"]),
    ],
)
def test_the_placements_are_where_the_papers_put_them_and_count_as_they_say(placement: Any, places: list[str]) -> None:
    adapters = attach(bert(), Bottleneck(placement=placement, reduction_factor=4))
    assert [site.path for site in adapters.sites("default")] == [
        f"encoder.layer.{i}.{place}" for i in (0, 1) for place in places
    ]
    D, W, per_layer = 32, 32 // 4, 2 if placement == "both" else 1
    assert sum(p.numel() for p in adapters.parameters()) == 2 * per_layer * (2 * D * W + W + D)


@pytest.mark.parametrize("placement", ["feedforward", "both", "parallel"])
@pytest.mark.parametrize(
    "family", ["Bert", "Llama", "GPT2", "T5", "Bart", "ViT", "DistilBert", "OPT", "GPTNeoX", "Bloom"]
)
def test_every_family_starts_as_the_base_and_every_parameter_learns(family: str, placement: Any) -> None:
    sizes: dict[str, dict[str, Any]] = {
        **dict.fromkeys(("Bert", "GPTNeoX", "Llama"), SMALL | {"num_hidden_layers": 1}),
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99},
        "T5": {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 4, "vocab_size": 99},
        "Bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "vocab_size": 99}
        | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "ViT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
        | {"image_size": 8, "patch_size": 4},
        "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
        "OPT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 99}
        | {"word_embed_proj_dim": 32},
        "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99},
    }
    special = {} if family in ("ViT", "DistilBert") else {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**sizes[family], **special)
    )
    model.eval().requires_grad_(False)  # torch sums in another order where a gradient is wanted
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if family == "ViT" else {"input_ids": ids(2)}
    if family == "T5":
        inputs["decoder_input_ids"] = ids(2)
    with torch.no_grad():
        base = model(**inputs)[0]
        adapters = attach(model, Bottleneck(placement=placement, width=2), seed=0)
        assert torch.equal(model(**inputs)[0], base)
    stir(adapters)
    out = model(**inputs)[0]
    assert not torch.allclose(out, base)
    (out * torch.randn_like(out)).sum().backward()
    adapters.check_gradients()
    adapters.detach()
    assert torch.equal(model(**inputs)[0], base)


@pytest.mark.parametrize("placement", ["feedforward", "both", "parallel"])
def test_torchs_encoder_learns_though_its_attention_reads_its_projections(placement: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 32)
    base = model(x)
    adapters = attach(model, Bottleneck(placement=placement, width=2))
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-5)  # torch's fused path is another order of sums
    stir(adapters)
    model(x).square().sum().backward()
    adapters.check_gradients()


@pytest.mark.parametrize("make", [bert, llama], ids=["two layers", "one module"])
@pytest.mark.parametrize("placement", ["both", "parallel"])
def test_compositions_are_what_they_say(make: Any, placement: Any) -> None:
    model, x = make(), ids()
    adapters = attach(model, Bottleneck(placement=placement, width=2), name="a")
    adapters.add(Bottleneck(placement=placement, width=3, non_linearity="tanh"), name="b")
    stir(adapters)
    alone = {}
    for name in ("a", "b", None):
        adapters.activate(name)
        alone[name] = model(x)[0]
    adapters.activate(Rows("b", None, "a"))
    expected = torch.stack([alone["b"][0], alone[None][1], alone["a"][2]])
    torch.testing.assert_close(model(x)[0], expected, atol=1e-5, rtol=1e-5)
    adapters.activate(Rows(Stack("a", "b"), "a", Stack("a", "b")))  # one adapter in two groups of rows
    mixed = model(x)[0]
    torch.testing.assert_close(mixed[1], alone["a"][1], atol=1e-5, rtol=1e-5)
    adapters.activate(Stack("a", "b"))
    torch.testing.assert_close(mixed[2], model(x)[0][2], atol=1e-5, rtol=1e-5)
    adapters.activate(Weighted(a=1.0, b=0.0))
    torch.testing.assert_close(model(x)[0], alone["a"], atol=1e-5, rtol=1e-5)


def test_a_weight_multiplies_what_the_adapter_changes() -> None:
    block, x = Block(), torch.randn(2, 6)
    base = block(x)
    adapters = attach(nn.ModuleDict({"layers": nn.ModuleList([block])}), Bottleneck(placement="parallel", width=2))
    stir(adapters)
    full = block(x)
    adapters.activate(Weighted(default=0.25))
    torch.testing.assert_close(block(x), base + 0.25 * (full - base))


def test_nothing_is_kept_between_the_two_layers_after_a_call_and_a_failed_call_leaves_no_trace() -> None:
    block = Block()
    adapters = attach(nn.ModuleDict({"layers": nn.ModuleList([block])}), Bottleneck(placement="parallel", width=2))
    stir(adapters)
    first = adapters.parts("default")["layers.0.fc1"]
    assert isinstance(first, FirstLayer)
    x = torch.randn(2, 6)
    expected = block(x)
    assert first.shared.hidden == {}
    block.fc1(torch.randn(2, 6))  # as if the call had failed before the last layer
    torch.testing.assert_close(block(x), expected, atol=0, rtol=0)
    assert first.shared.hidden == {}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = bert(), ids()
    adapters = attach(model, Bottleneck(placement="parallel", width=2))
    stir(adapters)
    gradients = []
    for rerun in (False, True):
        if rerun:
            for layer in model.encoder.layer:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model(x)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
        for parameter in adapters.parameters():
            parameter.grad = None
    assert len(gradients[0]) == len(adapters.parameters())
    torch.testing.assert_close(gradients[0], gradients[1])
    block = Block()
    adapters = attach(nn.ModuleDict({"layers": nn.ModuleList([block])}), Bottleneck(placement="parallel", width=2))
    h = torch.randn(2, 6)
    checkpoint(block, h, use_reentrant=False).sum().backward()
    assert adapters.parts("default")["layers.0.fc2"].shared.hidden == {}


@pytest.mark.parametrize("placement", ["both", "parallel"])
def test_copies_and_pickles_compute_the_same_and_share_nothing(placement: Any) -> None:
    model, x = bert(), ids()
    stir(attach(model, Bottleneck(placement=placement, width=2, non_linearity="tanh")))
    expected = model(x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(x)[0], expected)
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("placement", ["feedforward", "parallel"])
def test_compiled_without_breaks_it_is_the_same(placement: Any) -> None:
    block, x = Block(), torch.randn(2, 6)
    adapters = attach(nn.ModuleDict({"layers": nn.ModuleList([block])}), Bottleneck(placement=placement, width=2))
    stir(adapters)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    adapters.activate(None)
    torch.testing.assert_close(compiled(x), block(x))


def test_a_convolutions_channels_are_what_it_acts_on() -> None:
    conv, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 5, 5)
    base = conv(x)
    adapters = attach(conv, Bottleneck(targets="0", width=2))
    stir(adapters)
    down, down_bias, up, up_bias = adapters.parameters()
    h = torch.relu(torch.einsum("nchw,kc->nkhw", base, down) + down_bias.view(-1, 1, 1))
    expected = base + torch.einsum("nkhw,ck->nchw", h, up) + up_bias.view(-1, 1, 1)
    torch.testing.assert_close(conv(x), expected)


def test_a_named_module_of_any_kind_that_has_a_width_gets_one_after_it() -> None:
    model, x = llama(), ids()
    base = model(x)[0]
    adapters = attach(model, Bottleneck(targets=["layers.1", "*.self_attn", "embed_tokens"], width=2))
    assert torch.equal(model(x)[0], base)
    stir(adapters)
    model(x)[0].sum().backward()
    adapters.check_gradients()


def test_it_works_in_the_dtype_of_the_base() -> None:
    for placement in ("both", "parallel"):
        model = bert().bfloat16()
        adapters = attach(model, Bottleneck(placement=placement, width=2))
        stir(adapters)
        assert all(p.dtype == torch.float32 for p in adapters.parameters())
        assert model(ids())[0].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert bert()(ids())[0].dtype == torch.float32


def test_hidden_features_are_dropped_only_while_training() -> None:
    layer, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(400, 3)
    adapters = attach(layer, Bottleneck(targets="0", width=8, dropout=0.5))
    stir(adapters)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_it_does_not_merge() -> None:
    adapters = attach(bert(), Bottleneck())
    with pytest.raises(NotMergeable, match="changes activations"):
        adapters.merge()


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        TargetError, match=r"no feed-forward is recognised in Sequential. Name the places by hand: Bottle"
    ):
        attach(nn.Sequential(nn.Linear(3, 3)), Bottleneck())
    with pytest.raises(
        TargetError, match=r"have one end only.*encoder\.layer\.0\.output\.dense.*first layer and the last"
    ):
        attach(bert(), Bottleneck(placement="parallel", targets="encoder.layer.{0,1}.output.dense"))
    with pytest.raises(TargetError, match="it is a norm"):
        attach(bert(), Bottleneck(targets="*.LayerNorm"))
    with pytest.raises(TargetError, match="cannot be told"):
        attach(nn.Sequential(nn.ReLU()), Bottleneck(targets="0"))
    with pytest.raises(TargetError, match="on linear layers and whole feed-forwards"):
        attach(llama(), Bottleneck(placement="parallel", targets="*.self_attn"))
    with pytest.raises(TargetError, match="name the module"):
        attach(nn.TransformerEncoderLayer(8, 2, 8), Bottleneck(targets="self_attn.out_proj"))
    with pytest.raises(ConfigError, match='placement is "pfeiffer"; it is one of feedforward, both, normed, parallel'):
        Bottleneck(placement="pfeiffer")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="width is 0"):
        Bottleneck(width=0)


def test_at_a_norm_it_reads_what_the_norm_gives_and_adds_to_what_it_is_given() -> None:
    model, z = bert(), torch.randn(2, 5, 32)
    adapters = attach(model, Bottleneck(placement="normed", width=4, scale=0.7))
    assert [site.path for site in adapters.sites("default")] == [f"encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    stir(adapters)
    norm = model.encoder.layer[1].output.LayerNorm
    part = {name.rpartition(".")[2]: p for name, p in adapters.named_parameters() if ".1." in name}
    adapters.activate(None)
    h = norm(z)
    change = 0.7 * (torch.relu(h @ part["down"].T + part["down_bias"]) @ part["up"].T + part["up_bias"])
    expected = norm(z + change)
    adapters.activate("default")
    torch.testing.assert_close(norm(z), expected, rtol=0, atol=1e-5)


def test_norms_after_feedforwards_are_found_where_residuals_are_added_before_them() -> None:
    def places(model: Any) -> list[str]:
        return Bottleneck(placement="normed").auto(model)[0]

    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}
    distilbert = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes))
    assert places(distilbert) == ["transformer.layer.0.output_layer_norm"]
    albert = transformers.AlbertModel(transformers.AlbertConfig(**SMALL, embedding_size=8))
    assert places(albert) == ["encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    assert places(encoder) == ["layers.0.norm2", "layers.1.norm2"]
    with pytest.raises(TargetError, match="no norm after a feed-forward is recognised in LlamaModel"):
        places(llama())
    after_blocks = attach(llama(), Bottleneck(placement="normed", targets="layers.{0-1}"))
    assert len(after_blocks.sites("default")) == 2


@pytest.mark.parametrize("placement", ["feedforward", "both", "normed", "parallel"])
def test_the_first_blocks_can_be_left_out(placement: Any) -> None:
    model, x = bert(), ids()
    adapters = attach(model, Bottleneck(placement=placement, width=2, drop_first=1))
    stir(adapters)
    with torch.no_grad():
        left = model(x)[0]
        leave_out(adapters.parts("default"), 0)
        everything = model(x)[0]
        leave_out(adapters.parts("default"), 2)
        nothing = model(x)[0]
        adapters.activate(None)
        base = model(x)[0]
        adapters.activate("default")
        for name, p in adapters.named_parameters():
            if ".0." in name:
                p.zero_()
        leave_out(adapters.parts("default"), 0)
        assert torch.equal(model(x)[0], left)
    assert torch.equal(nothing, base)
    assert not torch.allclose(left, everything)
    assert not torch.allclose(left, base)


def test_while_training_the_number_of_blocks_left_out_is_drawn_for_every_call_but_the_first() -> None:
    model = bert()
    model.train()
    adapters = attach(model, Bottleneck(placement="both", width=2, drop_first=1))
    stir(adapters)
    counts = []
    for step in range(20):
        model(ids())[0].sum().backward()
        left = {name.split(".")[2] for name, p in adapters.named_parameters() if p.grad is None}
        if step == 0:
            adapters.check_gradients()
        counts.append(len(left))
        assert left == {str(block) for block in range(counts[-1])}
        for parameter in adapters.parameters():
            parameter.grad = None
    assert counts[0] == 0
    assert set(counts) == {0, 1}
    with pytest.raises(ConfigError, match="made with drop_first=0"):
        leave_out(attach(bert(), Bottleneck()).parts("default"), 1)
    with pytest.raises(TargetError, match="drop_first=2 would leave out all of the 2 blocks"):
        attach(bert(), Bottleneck(drop_first=2))
