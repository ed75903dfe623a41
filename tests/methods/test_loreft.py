"""LoReFT, NoReFT and DiReFT against their equations, computed naively in float64; and which tokens they act on."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smidgen import AdapterSet, Targets, Weighted, attach
from smidgen.core.blocks import blocks
from smidgen.core.errors import AttachError, ConfigError, TargetError
from smidgen.methods.direft import DiReFT
from smidgen.methods.loreft import LoReFT
from smidgen.methods.noreft import NoReFT

KINDS = {"loreft": LoReFT, "noreft": NoReFT, "direft": DiReFT}
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 23}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, initializer_range=0.3)).eval()


def stir(adapters: AdapterSet) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def changed(model: Any, adapters: AdapterSet, block: Any, **inputs: Any) -> Tensor:
    """(B, T): at which tokens the output of a block is not the base's."""
    outs: list[Tensor] = []
    with torch.no_grad():
        for active in (None, "default"):
            adapters.activate(active)
            hook = block.register_forward_hook(
                lambda module, args, out: outs.append(out[0] if type(out) is tuple else out)
            )
            model(**inputs)
            hook.remove()
    return (outs[0] != outs[1]).any(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("f", [None, "tanh"])
def test_it_is_the_papers_equation(kind: str, f: Any) -> None:
    layer, x = nn.Linear(5, 5).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    h = layer(x)
    method = KINDS[kind](rank=2, positions="all", non_linearity=f, targets="0")
    adapters = attach(nn.Sequential(layer), method)
    stir(adapters)
    P, W, b = (adapters.parts("default")["0"].get_parameter(f"every.{name}") for name in "PWb")
    if kind == "loreft":  # the rows of P made orthonormal one after the other
        first = P[0] / P[0].norm()
        second = P[1] - (P[1] @ first) * first
        P = torch.stack([first, second / second.norm()])
        torch.testing.assert_close(P @ P.T, torch.eye(2, dtype=torch.float64))
    inside = h @ W.T + b
    inside = torch.tanh(inside) if f else inside
    expected = h + (inside if kind == "direft" else inside - h @ P.T) @ P
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "units"), [({}, 2), ({"share_weights": True}, 1), ({"positions": "l3"}, 1)])
def test_it_trains_as_many_numbers_as_the_paper_says(kind: str, settings: dict[str, Any], units: int) -> None:
    adapters = attach(llama(), KINDS[kind](rank=3, **settings))
    D, r, layers = 8, 3, 2
    assert sum(p.numel() for p in adapters.parameters()) == layers * units * (2 * r * D + r)


def test_a_matrix_with_orthonormal_rows_is_itself_the_rotation() -> None:
    adapters = attach(nn.Sequential(nn.Linear(7, 7)), LoReFT(rank=3, targets="0", positions="all"), seed=0)
    unit = adapters.parts("default")["0"].get_submodule("every")
    torch.testing.assert_close(unit.projection(), unit.P, rtol=0, atol=1e-6)  # type: ignore[operator]
    assert torch.equal(unit.W, unit.projection())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        *(("f1+l1", "x.....x"), ("f2+l1", "xx....x"), ("f2", "xx....."), ("l3", "....xxx"), ("all", "xxxxxxx")),
        *(("f5+l5", "xxx.xxx"), ("f9", "xxxxxxx")),
    ],
)
def test_it_acts_on_the_first_and_last_tokens_and_no_others(positions: str, expected: str) -> None:
    model = llama()
    adapters = attach(model, LoReFT(rank=2, positions=positions, targets="layers.0"), seed=0)
    stir(adapters)
    found = changed(model, adapters, model.model.layers[0], input_ids=torch.arange(3, 17).view(2, 7))
    assert ["".join(".x"[int(at)] for at in row) for row in found] == [expected] * 2


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("share", [False, True])
def test_padding_on_either_side_is_no_part_of_a_row(make: Any, share: bool) -> None:
    model = make()
    block = blocks(model)[0]
    adapters = attach(model, LoReFT(rank=2, positions="f2+l1", share_weights=share, targets=Targets.exactly([block])))
    stir(adapters)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]])
    ids = torch.randint(3, 23, (4, 7))
    found = changed(model, adapters, model.get_submodule(block), input_ids=ids, attention_mask=mask)
    rows = ["".join(".x"[int(at)] for at in row) for row in found]
    assert rows == ["xx..x..", "...xx.x", ".x.x...", "......x"]
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1][0, :5]
        alone = model(input_ids=ids[:1, :5], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_in_training_a_language_model_the_row_is_the_prompt() -> None:
    model = llama()
    adapters = attach(model, LoReFT(rank=2, targets="layers.0"), seed=0)
    stir(adapters)
    ids = torch.randint(3, 23, (2, 7))
    labels = ids.clone()
    labels[0, :3], labels[1, :5] = -100, -100
    found = changed(model, adapters, model.model.layers[0], input_ids=ids, labels=labels)
    assert ["".join(".x"[int(at)] for at in row) for row in found] == ["x.x....", "x...x.."]
    found = changed(model, adapters, model.model.layers[0], input_ids=ids, labels=ids)  # nothing is a prompt
    assert found[0].tolist() == [True, False, False, False, False, False, True]
    found = changed(model, adapters, model.model.layers[0], input_ids=ids)  # and nothing is remembered
    assert found[0].tolist() == [True, False, False, False, False, False, True]


def test_labels_that_are_no_text_do_not_shorten_a_row() -> None:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    model = transformers.BertForTokenClassification(config).eval()
    adapters = attach(model, LoReFT(rank=2, targets="layer.0"), seed=0)
    stir(adapters)
    ids, labels = torch.randint(3, 23, (2, 5)), torch.tensor([[-100, 0, 1, 2, -100]] * 2)
    found = changed(model, adapters, model.bert.encoder.layer[0], input_ids=ids, labels=labels)
    assert found[0].tolist() == [True, False, False, False, True]


def test_generation_with_a_cache_is_as_without_one() -> None:
    model = llama()
    stir(attach(model, LoReFT(rank=2)))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    step, cache = ids, None  # the same by hand: the prompt's tokens alone are changed
    with torch.no_grad():
        for count in range(4):
            wide = torch.cat([mask, mask.new_ones(2, count)], 1)
            position_ids = (wide.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
            given = model(step, attention_mask=wide, position_ids=position_ids, past_key_values=cache, use_cache=True)
            cache, step = given.past_key_values, given.logits[:, -1:].argmax(-1)
            assert torch.equal(step[:, 0], out[:, 5 + count])


def test_a_seq2seq_model_reads_a_mask_for_each_of_its_halves() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    adapters = attach(model, NoReFT(rank=2, positions="l1"))
    assert [site.path for site in adapters.sites("default")] == [
        *(f"{half}.block.{n}" for half in ("encoder", "decoder") for n in (0, 1)),
        *("encoder", "decoder", ""),
    ]
    stir(adapters)
    ids, mask = torch.randint(3, 23, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    found = changed(model, adapters, model.encoder.block[0], **inputs)
    assert found.int().argmax(1).tolist() == [2, 4]
    found = changed(model, adapters, model.decoder.block[0], **inputs)
    assert found[:, 3].all()
    model.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_torchs_encoder_says_its_padding_the_other_way_round() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    adapters = attach(model, DiReFT(rank=2, positions="l1", targets="layers.0"))
    stir(adapters)
    hidden = torch.tensor([[False, False, True, True], [False, False, False, False]])
    model.train()
    found = changed(model, adapters, model.layers[0], src=torch.randn(2, 4, 8), src_key_padding_mask=hidden)
    assert found.int().argmax(1).tolist() == [1, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_act_on_the_same_tokens_when_they_run_again(reentrant: bool) -> None:
    model = llama().train()
    adapters = attach(model, LoReFT(rank=2))
    stir(adapters)
    ids, mask = torch.randint(3, 23, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    gradients = []
    for rerun in (False, True):
        if rerun:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in adapters.parameters()])
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_share_of_it_is_that_share_of_the_change() -> None:
    model, ids = llama(), torch.randint(3, 23, (2, 6))
    adapters = attach(model, LoReFT(rank=2, targets="layers.1"))
    stir(adapters)
    hidden = {}
    for weight in (0.0, 0.25, 1.0):
        adapters.activate(Weighted(default=weight))
        hidden[weight] = _before_the_norm(model, ids)
    torch.testing.assert_close(hidden[0.25], hidden[0.0] + 0.25 * (hidden[1.0] - hidden[0.0]), rtol=0, atol=1e-5)
    assert not torch.allclose(hidden[1.0], hidden[0.0])


def _before_the_norm(model: Any, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def test_dropout_is_of_the_whole_changed_state_as_in_the_authors_code() -> None:
    layer = nn.Sequential(nn.Linear(5, 5))
    adapters = attach(layer, LoReFT(rank=2, targets="0", positions="f1", dropout=0.5))
    stir(adapters)
    x = torch.randn(200, 3, 5)
    base, plain, dropped = layer.eval()(x), copy.deepcopy(layer).eval()(x), layer.train()(x)
    gone = dropped[:, 0].abs() < 1e-6  # (h + change) 0
    assert 0.4 < gone.float().mean() < 0.6
    torch.testing.assert_close(dropped[:, 0][~gone], 2 * plain[:, 0][~gone], rtol=0, atol=1e-5)
    assert torch.equal(dropped[:, 1:], base[:, 1:])


def test_every_recognised_block_is_a_place() -> None:
    assert blocks(llama()) == ["model.layers.0", "model.layers.1"]
    assert blocks(bert()) == ["encoder.layer.0", "encoder.layer.1"]
    assert blocks(nn.TransformerEncoderLayer(8, 2, 12)) == [""]
    assert blocks(nn.Sequential(nn.Linear(3, 3))) == []
    mixtral = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    assert blocks(transformers.MixtralModel(mixtral)) == ["layers.0", "layers.1"]  # its experts are one parameter
    swin = transformers.SwinConfig(
        image_size=8, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 1], window_size=2
    )
    assert blocks(transformers.SwinModel(swin)) == ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0"]


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match='positions is "first"; it is "all" or of the form "f1\\+l1"'):
        LoReFT(positions="first")
    for positions in ("f1+", "+l1", "", "f0"):
        with pytest.raises(ConfigError, match="positions is"):
            LoReFT(positions=positions)
    with pytest.raises(TargetError, match="no block is recognised"):
        attach(nn.Sequential(nn.Linear(3, 3)), LoReFT())
    with pytest.raises(TargetError, match=r"rank is 9"):
        attach(llama(), LoReFT(rank=9))
    with pytest.raises(TargetError, match="batch_first=True"):
        attach(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False), LoReFT(rank=2)
        )
    with pytest.raises(TargetError, match=r"model: a whole model has no place for loreft. Name blocks of it"):
        attach(llama(), LoReFT(targets="model"))
    with pytest.raises(TargetError, match="gives no hidden states"):
        attach(nn.Sequential(nn.Conv1d(3, 3, 1)), LoReFT(rank=2, targets="0"))
    model = llama()
    attach(model, LoReFT())
    with pytest.raises(AttachError, match=r"attention_mask is \(1, 1, 4, 4\)"):
        model(torch.arange(4)[None], attention_mask=torch.ones(1, 1, 4, 4))
