"""Which output channels are q, k and v: asked of the models themselves, by moving those of one position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smidgen.core.errors import TargetError
from smidgen.core.fused_attention import channels_of, fused_projections

from ..formats.models import Attention, llama

SIZE = {"vocab_size": 40, "attn_implementation": "eager"}
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "bloom": (transformers.BloomConfig, {"hidden_size": 32, "n_head": 4, "n_layer": 1}),
    "falcon": (transformers.FalconConfig, {**WIDE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_of_one_group": (transformers.FalconConfig, {**WIDE, "multi_query": True, "alibi": False}),
    "falcon_with_alibi": (transformers.FalconConfig, {**WIDE, "multi_query": False, "alibi": True}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_head": 4, "n_layer": 1}),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, {"n_embd": 32, "n_head": 4, "n_layer": 1, "multi_query": False}),
    "gpt_bigcode_of_one_group": (transformers.GPTBigCodeConfig, {"n_embd": 32, "n_head": 4, "n_layer": 1}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**WIDE, "intermediate_size": 48}),
    "modernbert": (transformers.ModernBertConfig, {**WIDE, "intermediate_size": 48, "pad_token_id": 0}),
    "mpt": (transformers.MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 1}),
    "persimmon": (transformers.PersimmonConfig, {**WIDE, "intermediate_size": 48}),
    "phi3": (
        transformers.Phi3Config,
        {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0},
    ),
}
AT = 3  # the position that is moved


def model_of(name: str) -> nn.Module:
    config, settings = MODELS[name]
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config(**settings, vocab_size=40), attn_implementation="eager").eval()


@torch.no_grad()
def seen(model: nn.Module, layer: nn.Module, channels: list[int]) -> tuple[Tensor, Tensor]:
    """Attention (T, T) summed over heads, and output (T, D), with these channels moved at one position."""

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        generator = torch.Generator().manual_seed(1)
        output[..., AT, channels] += torch.randn(len(channels), generator=generator)
        return output

    handle = layer.register_forward_hook(move)
    try:
        out = model(input_ids=torch.arange(1, 7)[None], output_attentions=True)
    finally:
        handle.remove()
    return out.attentions[0][0].abs().sum(0), out.last_hidden_state[0]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", MODELS)
def test_q_moves_a_row_of_the_attention_k_a_column_and_v_none(name: str):
    model = model_of(name)
    at = {part: fused_projections(model, part) for part in "qkv"}
    (site, _) = at["q"][0]
    rows = {part: [i for start, stop in at[part][0][1] for i in range(start, stop)] for part in "qkv"}
    assert sorted(rows["q"] + rows["k"] + rows["v"]) == list(range(site.fan_out))
    base, output = seen(model, site.layer, [])
    moved = {part: seen(model, site.layer, rows[part]) for part in "qkv"}
    differs = {part: (attention - base).abs() > 1e-7 for part, (attention, _) in moved.items()}
    assert differs["q"].any(1).nonzero().flatten().tolist() == [AT]
    assert differs["k"].any(1).sum() > 1
    assert differs["k"][:, AT].any()
    assert not differs["v"].any()
    assert not torch.equal(moved["v"][1], output)


def test_multihead_attention_has_q_k_and_v_side_by_side():
    ((site, rows),) = fused_projections(Attention(), "qv")
    assert (site.name, rows) == ("attention.in_proj_weight", ((0, 8), (16, 24)))


def test_the_two_layouts():
    grouped: Callable[..., Any] = lambda parts, **how: channels_of(parts, heads=4, groups=2, width=3, **how)  # noqa: E731
    assert grouped("q", by_group=False) == ((0, 12),)
    assert grouped("qk", by_group=False) == ((0, 18),)
    assert grouped("qv", by_group=False) == ((0, 12), (18, 24))
    assert grouped("q", by_group=True) == ((0, 6), (12, 18))
    assert grouped("qv", by_group=True) == ((0, 6), (9, 18), (21, 24))
    assert grouped("qkv", by_group=True) == ((0, 24),)


def test_a_model_without_is_told_what_to_say():
    with pytest.raises(TargetError, match=r"no layer that is known to hold q, k and v.*gpt2"):
        fused_projections(llama(), "q")


def test_cross_attention_of_gpt2_holds_no_q():
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=40, add_cross_attention=True)
    assert [site.path for site, _ in fused_projections(transformers.GPT2Model(config), "q")] == ["h.0.attn.c_attn"]
