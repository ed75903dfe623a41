"""LLaMA-Adapter: its equations by hand in float64, and Hugging Face PEFT 0.21.2."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core.composition import Stack
from smidgen.core.errors import ConfigError, FolderError, TargetError
from smidgen.methods.adaption_prompt import AdaptionPrompt
from smidgen.methods.prefix_tuning import PrefixTuning

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
IDS = torch.tensor([[3, 9, 27, 4], [5, 4, 1, 8]])
N = 3


def mistral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, vocab_size=60)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MistralForCausalLM(config).eval()


def encoder(name: str) -> Any:
    sizes = {
        "Bert": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32},
        "T5": {"d_model": 24, "d_ff": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "decoder_start_token_id": 0},
        "Bart": {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    }[name.split("For")[0]]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**sizes, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def strong(model: nn.Module, **settings: Any) -> AdapterSet:
    adapters = attach(model, AdaptionPrompt(length=N, **settings), seed=0)
    with torch.no_grad():
        for part in adapters.parts("default").values():
            part.gate.fill_(0.7)
    return adapters


class Plain(nn.Module):
    """Attention of two key/value heads for four, as plain torch code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o_proj = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


def test_it_is_the_papers_equations() -> None:
    layer = Plain().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    base = layer(x)
    (part,) = strong(layer).parts("default").values()
    K, V = part.prompt[0] @ layer.k_proj.weight.T + layer.k_proj.bias, part.prompt[0] @ layer.v_proj.weight.T
    V = V + layer.v_proj.bias
    read = torch.zeros(2, 5, 8, dtype=torch.float64)
    for head in range(4):
        q = layer.q_proj(x)[..., 2 * head : 2 * head + 2]
        columns = slice(2 * (head // 2), 2 * (head // 2) + 2)
        scores = (q @ K[:, columns].T / 2**0.5).softmax(-1)
        read[..., 2 * head : 2 * head + 2] = scores @ V[:, columns]
    torch.testing.assert_close(layer(x), base + 0.7 * read @ layer.o_proj.weight.T, rtol=0, atol=1e-12)


def test_the_topmost_self_attentions_get_a_prompt_each() -> None:
    for name, ends in (
        ("BartForConditionalGeneration", ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]),
        ("BertForSequenceClassification", ["layer.0.attention.self", "layer.1.attention.self"]),
    ):
        adapters = strong(encoder(name))
        assert [site.path.endswith(end) for site, end in zip(adapters.sites("default"), ends, strict=True)] == [
            True
        ] * 2
    (site,) = strong(llama(), layers=1).sites("default")
    assert site.path == "model.layers.1.self_attn"
    adapters = strong(llama())
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (N * 32 + 1)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_eager_and_fused_attention_agree(name: str) -> None:
    model = encoder(name)
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    base = model(IDS, **inputs).logits
    strong(model)
    fused = model(IDS, **inputs).logits
    assert not torch.allclose(fused, base, rtol=0, atol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(IDS, **inputs).logits, fused)


def test_generating_with_a_cache_gives_what_it_gives_without() -> None:
    model: Any = llama()
    strong(model)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(IDS, **options, use_cache=True)
    assert torch.equal(cached, model.generate(IDS, **options, use_cache=False))


@pytest.mark.parametrize("make", [llama, Plain])
def test_it_stacks_with_a_prefix_in_any_order(make: Any) -> None:
    model = make()
    x = IDS if hasattr(model, "config") else torch.randn(2, 5, 8)
    adapters = strong(model)
    adapters.add(PrefixTuning(length=2, init_std=1.0), "prefix", seed=1)
    outputs = []
    for active in ("default", "prefix", Stack("default", "prefix"), Stack("prefix", "default")):
        adapters.activate(active)
        out = model(x)
        outputs.append(out if isinstance(out, Tensor) else out.logits)
    torch.testing.assert_close(outputs[2], outputs[3])
    assert all(not torch.allclose(outputs[2], other, atol=1e-3) for other in outputs[:2])


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@pytest.mark.parametrize("layers", [1, 2])
def test_both_ways_with_hf_peft(make: Any, layers: int) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=N, adapter_layers=layers, task_type="CAUSAL_LM")
    from_peft(make, config)
    says = {"adapter_len": N, "adapter_layers": layers}
    to_peft_and_back(make, AdaptionPrompt(length=N, layers=layers, projected=make is not gpt2), says=says)


def test_what_hf_peft_computes_otherwise_is_not_read_or_written_as_its_own(tmp_path: Path) -> None:
    def biased() -> nn.Module:
        return llama(attention_bias=True)

    theirs = peft.get_peft_model(biased(), peft.AdaptionPromptConfig(adapter_len=N, adapter_layers=1))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(FolderError, match="bias of the output layer a second time"):
        load(biased(), tmp_path / "theirs")
    for number, (model, settings, why) in enumerate(
        ((biased(), {}, "second time"), (gpt2(), {}, "projected"), (llama(), {"targets": "layers.0.self_attn"}, "top"))
    ):
        adapters = strong(model, **settings)
        adapters.save(tmp_path / str(number))
        assert why in (tmp_path / str(number) / "smidgen.json").read_text()


def test_what_cannot_have_a_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="length is 0"):
        AdaptionPrompt(length=0)
    with pytest.raises(TargetError, match="layers is 3; LlamaForCausalLM has 2"):
        attach(llama(), AdaptionPrompt(layers=3))
    with pytest.raises(TargetError, match="MultiheadAttention computes no attention that a prompt can stand beside"):
        attach(nn.Sequential(nn.MultiheadAttention(8, 2)), AdaptionPrompt(targets="0"))
