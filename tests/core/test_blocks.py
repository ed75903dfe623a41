"""Where the attentions and feed-forwards are, on small random models of each family."""

from typing import Any

import pytest
import torch
from torch import nn

from smidgen.core.blocks import (
    Attention,
    FeedForward,
    attentions,
    feedforward_half,
    feedforwards,
    not_recognised,
    output_width,
)

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def model(name: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        return getattr(transformers, f"{name}Model")(config)


# family, settings; block / attention: its query, key, value, output / owner of the feed-forward ("" the block): layers
FAMILIES = [
    ("Bert", BERT, "encoder.layer.1 / attention: self.query self.key self.value output.dense / : {0}"),
    (
        "DebertaV2",
        BERT,
        "encoder.layer.1 / attention: self.query_proj self.key_proj self.value_proj output.dense / : {0}",
    ),
    ("Deberta", BERT, "encoder.layer.1 / attention: self.in_proj self.in_proj self.in_proj output.dense / : {0}"),
    ("DistilBert", DISTIL, "transformer.layer.1 / attention: q_lin k_lin v_lin out_lin / ffn: lin1 lin2"),
    ("Llama", BERT, "layers.1 / self_attn: q_proj k_proj v_proj o_proj / mlp: gate_proj up_proj down_proj"),
    ("OPT", OPT, "decoder.layers.1 / self_attn: q_proj k_proj v_proj out_proj / : fc1 fc2"),
    ("GPT2", GPT, "h.1 / attn: c_attn c_attn c_attn c_proj / mlp: c_fc c_proj"),
    ("GPTJ", GPT | {"rotary_dim": 8}, "h.1 / attn: q_proj k_proj v_proj out_proj / mlp: fc_in fc_out"),
    ("GPTNeoX", BERT, "layers.1 / attention: {1} {1} {1} dense / mlp: dense_h_to_4h dense_4h_to_h"),
    ("Bloom", BLOOM, "h.1 / self_attention: {1} {1} {1} dense / mlp: dense_h_to_4h dense_4h_to_h"),
    ("ViT", BERT, "layers.1 / attention: q_proj k_proj v_proj o_proj / mlp: fc1 fc2"),
]


@pytest.mark.parametrize(("name", "settings", "where"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_each_familys_attention_and_feedforward_are_found_in_every_block(
    name: str, settings: dict[str, int], where: str
) -> None:
    where = where.format("intermediate.dense output.dense", "query_key_value")
    block, *parts = where.split(" / ")
    (attention, projections), (owner, layers) = (part.split(": ") for part in parts)
    found, path = model(name, **settings), f"{block}.{attention}"
    query, key, value, output = (f"{path}.{layer}" for layer in projections.split())
    assert len(attentions(found)) == len(feedforwards(found)) == 2
    assert attentions(found)[1] == Attention(path, query, key, value, output, cross=False)
    path = f"{block}.{owner}" if owner else block
    *inputs, last = (f"{path}.{layer}" for layer in layers.split())
    assert feedforwards(found)[1] == FeedForward(path, tuple(inputs), last, whole=bool(owner))
    assert output_width(found.get_submodule(block)) == 32


@pytest.mark.parametrize(
    ("name", "settings", "crossing"),
    [
        ("T5", T5, "decoder.block.1.layer.1.EncDecAttention"),
        ("Bart", BART, "decoder.layers.1.encoder_attn"),
        ("GPT2", GPT | {"add_cross_attention": True}, "h.1.crossattention"),
        ("Bert", BERT | {"is_decoder": True, "add_cross_attention": True}, "encoder.layer.1.crossattention"),
    ],
)
def test_cross_attention_is_told_from_self_attention(name: str, settings: dict[str, Any], crossing: str) -> None:
    found = attentions(model(name, **settings))
    assert [part.path for part in found if part.cross][-1] == crossing
    assert sum(part.cross for part in found) == 2
    assert sum(not part.cross for part in found) == (4 if name in ("T5", "Bart") else 2)


def test_gpt2s_cross_attention_has_its_query_apart() -> None:
    part = attentions(model("GPT2", **GPT, add_cross_attention=True))[1]
    assert (part.query, part.key) == ("h.0.crossattention.q_attn", "h.0.crossattention.c_attn")


def test_gated_t5_has_two_inputs_and_a_module_of_its_own() -> None:
    gated = model("T5", **T5, feed_forward_proj="gated-gelu")
    owner = "encoder.block.0.layer.1.DenseReluDense"
    assert feedforwards(gated)[0] == FeedForward(owner, (f"{owner}.wi_0", f"{owner}.wi_1"), f"{owner}.wo", whole=True)


def test_torchs_own_layers_are_found_though_their_projections_are_no_calls() -> None:
    found = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
    parts = [part for part in attentions(found) if part.path.startswith("decoder")]
    assert [(part.path, part.key, part.cross) for part in parts] == [
        ("decoder.layers.0.self_attn", None, False),
        ("decoder.layers.0.multihead_attn", None, True),
    ]
    assert [part.path for part in feedforwards(found)] == ["encoder.layers.0", "decoder.layers.0"]
    assert not any(part.whole for part in feedforwards(found))
    assert output_width(found.encoder.layers[0].self_attn) == 32


def test_timms_names_are_found() -> None:
    block = nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)}),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)}),
        }
    )
    found = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    assert attentions(found) == [Attention("blocks.0.attn", *["blocks.0.attn.qkv"] * 3, "blocks.0.attn.proj", False)]
    assert feedforwards(found) == [FeedForward("blocks.0.mlp", ("blocks.0.mlp.fc1",), "blocks.0.mlp.fc2", True)]


def test_a_classifier_with_a_feedforwards_names_is_none_as_nothing_is_added_to_its_input() -> None:
    assert feedforwards(nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 3)})) == []


@pytest.mark.parametrize(
    ("path", "half"),
    [
        ("encoder.layer.0.intermediate.dense", ("input", "encoder.layer.0")),
        ("encoder.layer.0.output.dense", ("output", "encoder.layer.0")),
        ("encoder.layer.0.attention.output.dense", None),
        ("decoder.layers.3.fc2", ("output", "decoder.layers.3")),
        ("linear1", ("input", "")),
        ("h.0.attn.c_proj", None),
        ("layers.0.self_attn.q_proj", None),
    ],
)
def test_a_feedforwards_ends_are_known_by_name(path: str, half: tuple[str, str] | None) -> None:
    assert feedforward_half(path) == half


def test_a_model_without_known_names_is_refused_with_what_it_has() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert (attentions(plain), feedforwards(plain), output_width(plain)) == ([], [], None)
    named = nn.ModuleDict({"mixer": nn.Linear(4, 4)})
    message = str(not_recognised(named, "feed-forward", 'Bottleneck(targets=["*.fc2"])'))
    assert message == (
        'no feed-forward is recognised in ModuleDict. Name the places by hand: Bottleneck(targets=["*.fc2"]). '
        "It has: *.mixer"
    )
