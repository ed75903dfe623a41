"""Prefix tuning: attention over concatenated keys and values by hand in float64, wherever attention lives."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen import attach
from smidgen.adapters import AdapterSet, load
from smidgen.core import attention_calls
from smidgen.core.composition import Rows, Stack, Weighted
from smidgen.core.errors import AttachError, ConfigError, FolderError, NotMergeable, TargetError
from smidgen.core.prefixes import PrefixAdapter
from smidgen.core.targets import Targets
from smidgen.methods.prefix_tuning import PrefixTuning

from ..formats.both_ways import to_peft_and_back

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = TOKENS | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": BERT,
    "LlamaForCausalLM": BERT | {"num_key_value_heads": 2},
    "MistralForCausalLM": BERT | {"num_key_value_heads": 2, "sliding_window": 3},
    "DebertaV2ForSequenceClassification": BERT,
    "GPT2LMHeadModel": TOKENS | {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "T5ForConditionalGeneration": TOKENS
    | {"d_model": 24, "d_ff": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "decoder_start_token_id": 0},
    "BartForConditionalGeneration": TOKENS
    | {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40},
}
FAMILIES = [name for name in SETTINGS if not name.startswith("Deberta")]
DECODERS = ["LlamaForCausalLM", "GPT2LMHeadModel"]
GENERATORS = [*DECODERS, "MistralForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"]
IDS = torch.tensor([[3, 9, 27, 21, 4, 12, 36], [50, 41, 14, 42, 17, 51, 44]])
N = 3


def tiny(name: str, **settings: Any) -> Any:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**SETTINGS[name], **settings)).eval()


def run(model: Any, **inputs: Any) -> Tensor:
    inputs = {"input_ids": IDS, **inputs}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits: Tensor = model(**inputs).logits
    return logits


def strong(model: nn.Module, name: str = "default", **settings: Any) -> AdapterSet:
    """A prefix that matters as much as real tokens do."""
    return attach(model, PrefixTuning(length=N, init_std=1.0, **settings), name, seed=len(name))


def by_hand(q: Tensor, k: Tensor, v: Tensor, K: Tensor, V: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention with K and V in front.   q, k, v: (B, H, T, d)   K, V: (N, H d)   mask: added, over real keys."""
    B, H, _, d = k.shape
    k = torch.cat((K.view(-1, H, d).transpose(0, 1).expand(B, -1, -1, -1), k), dim=2)
    v = torch.cat((V.view(-1, H, d).transpose(0, 1).expand(B, -1, -1, -1), v), dim=2)
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + torch.cat((torch.zeros(*mask.shape[:-1], len(K), dtype=mask.dtype), mask), dim=-1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


class Plain(nn.Module):
    """Attention as plain torch code has it.   mask: None, or (T, T)."""

    def __init__(self, *, causal: bool, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal, self.fused = 4, causal, fused
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (heads(part, 4) for part in self.qkv(x).chunk(3, -1))
        if not self.fused:
            return self.proj((q @ k.transpose(2, 3)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).flatten(2))


CAUSAL = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
MASKS = {
    "none": (False, None, None),
    "causal": (True, None, CAUSAL),
    "bool": (False, CAUSAL == 0, CAUSAL),
    "additive": (False, CAUSAL, CAUSAL),
}


@pytest.mark.parametrize("case", MASKS)
def test_plain_torch_attention_equals_the_formula(case: str) -> None:
    causal, mask, added = MASKS[case]
    layer = Plain(causal=causal).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (heads(part, 4) for part in layer.qkv(x).chunk(3, -1))
    K, V = strong(layer).parameters()
    expected = layer.proj(by_hand(q, k, v, K, V, 6**-0.5, added))
    torch.testing.assert_close(layer(x, mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: Plain(causal=True), lambda: tiny("LlamaForCausalLM")], ids=["torch", "llama"])
def test_a_mask_and_rows_of_zeros_are_two_ways_to_the_same(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results, padding = [], []
    monkeypatch.setattr(F, "pad", lambda *args, pad=F.pad, **kwargs: padding.append(1) or pad(*args, **kwargs))
    for block, padded in ((512, False), (0, True)):
        monkeypatch.setattr(attention_calls, "_BLOCK", block)
        torch.manual_seed(0)
        model = make().double()
        adapters = strong(model)
        padding.clear()
        y = run(model) if hasattr(model, "config") else model(torch.ones(2, 5, 24, dtype=torch.float64).cumsum(1))
        assert bool(padding) == padded
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in adapters.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "weights", "causal", "padding"])
def test_multihead_attention_equals_the_formula(mask: str, batch_first: bool) -> None:
    layer = nn.MultiheadAttention(24, 4, batch_first=batch_first).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    options: dict[str, dict[str, Any]] = {
        "none": {"need_weights": False},
        "weights": {},
        "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
        "padding": {"key_padding_mask": padding},
    }
    added = {"causal": CAUSAL, "padding": torch.zeros(2, 1, 1, 5).masked_fill(padding[:, None, None], float("-inf"))}
    parts = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    K, V = strong(layer).parameters()
    expected = layer.out_proj(by_hand(*(heads(part, 4) for part in parts), K, V, 6**-0.5, added.get(mask)))
    given = x if batch_first else x.transpose(0, 1)
    got = layer(given, given, given, **options[mask])[0]
    torch.testing.assert_close(got if batch_first else got.transpose(0, 1), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # torch has a fused path here
        assert torch.equal(layer.eval()(given, given, given, **options[mask])[0], got)


def test_bert_attention_equals_the_formula() -> None:
    layer = tiny("BertForSequenceClassification").double().bert.encoder.layer[0].attention.self
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    K, V = strong(layer).parameters()
    expected = by_hand(heads(layer.query(x), 4), heads(layer.key(x), 4), heads(layer.value(x), 4), K, V, 6**-0.5)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


def test_t5_has_no_position_bias_towards_the_prefix() -> None:
    layer = tiny("T5ForConditionalGeneration").double().encoder.block[0].layer[0].SelfAttention
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    bias = layer.compute_bias(5, 5)
    K, V = strong(layer).parameters()
    expected = layer.o(by_hand(heads(layer.q(x), 4), heads(layer.k(x), 4), heads(layer.v(x), 4), K, V, 1.0, bias))
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_equals_its_own_cache_filled_with_the_prefix(name: str, implementation: str) -> None:
    model = tiny(name).double()
    model.set_attn_implementation(implementation)
    adapters = strong(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    positions = torch.arange(7)[None]
    got = run(model, attention_mask=mask, position_ids=positions)
    cache = transformers.DynamicCache()
    for layer, part in enumerate(adapters.parts("default").values()):
        assert isinstance(part, PrefixAdapter)
        cache.update(*(tensor.view(N, -1, 6).transpose(0, 1).expand(2, -1, -1, -1) for tensor in part.front()), layer)
    adapters.activate(None)
    expected = run(model, attention_mask=F.pad(mask, (N, 0), value=1), position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_and_fused_attention_agree_with_and_without_a_mask(name: str) -> None:
    model = tiny(name)
    base = run(model)
    adapters = strong(model)
    fused = run(model)
    assert not torch.allclose(fused, base, atol=1e-5)
    torch.testing.assert_close(run(model, attention_mask=torch.ones_like(IDS)), fused)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(run(model), fused)
    model.set_attn_implementation("sdpa")
    adapters.detach()
    assert torch.equal(run(model), base)


def test_a_sliding_window_does_not_hide_the_prefix() -> None:
    model = tiny("MistralForCausalLM", tie_word_embeddings=False)
    adapters = strong(model)
    run(model)[:, -1].sum().backward()
    adapters.check_gradients()
    assert all(p.grad is not None and p.grad.abs().sum() > 1e-3 for p in adapters.parameters())


@pytest.mark.parametrize("name", GENERATORS)
def test_generating_with_a_cache_gives_what_it_gives_without(name: str) -> None:
    model = tiny(name)
    strong(model)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(IDS, **options, use_cache=True)
    assert torch.equal(cached, model.generate(IDS, **options, use_cache=False))
    beams = model.generate(IDS, **options, num_beams=2, use_cache=True)
    assert torch.equal(beams, model.generate(IDS, **options, num_beams=2, use_cache=False))


def test_config_and_cache_stay_the_models_own() -> None:
    model = tiny("LlamaForCausalLM")
    written = model.config.to_json_string()
    strong(model)
    out = model(IDS, use_cache=True)
    assert out.past_key_values.get_seq_length() == IDS.shape[1]
    assert all(m.config is model.config for m in model.modules() if type(m).__name__ == "LlamaAttention")
    assert model.config.to_json_string() == written


@pytest.mark.parametrize("name", FAMILIES)
def test_the_number_of_parameters_is_the_formula(name: str) -> None:
    sites, width = {"Bart": (3, 24), "T5": (6, 24), "Llama": (2, 12), "Mistral": (2, 12)}.get(
        name.split("For")[0], (2, 24)
    )
    adapters = strong(tiny(name))
    assert len(adapters.sites("default")) == sites
    assert sum(p.numel() for p in adapters.parameters()) == sites * N * 2 * width
    M = 5
    adapters = strong(tiny(name), reparametrisation=M)
    mlp = N * width + M * (width + 1) + sites * (M + 1) * 2 * width
    assert sum(p.numel() for p in adapters.parameters()) == mlp


def test_a_reparametrised_prefix_is_its_mlp_and_can_be_baked_in() -> None:
    model = tiny("LlamaForCausalLM")
    adapters = strong(model, reparametrisation=5)
    shared = next(iter(adapters.parts("default").values())).shared
    hidden = torch.tanh(shared.embedding @ shared.weight.T + shared.bias)
    other = strong(copy.deepcopy(model).requires_grad_(False), "baked")
    for part, baked in zip(adapters.parts("default").values(), other.parts("baked").values(), strict=True):
        assert isinstance(part, PrefixAdapter)
        assert isinstance(baked, PrefixAdapter)
        K, V = part.front()
        torch.testing.assert_close(torch.cat((K, V), 1), hidden @ part.weight.T + part.bias)
        with torch.no_grad():
            baked.K.copy_(K)
            baked.V.copy_(V)
    other.activate("baked")
    torch.testing.assert_close(run(other.model), run(model))
    run(model).sum().backward()
    adapters.check_gradients()


@pytest.mark.filterwarnings("ignore")  # HF PEFT's own
def test_hf_peft_reads_what_the_mlp_computes_and_we_read_the_mlp(tmp_path: Path) -> None:
    method = PrefixTuning(length=N, reparametrisation=5, shift_positions=True, init_std=1.0)
    to_peft_and_back(lambda: seeded("LlamaForCausalLM"), method)
    model = seeded("LlamaForCausalLM")
    attach(model, method, seed=0).save(tmp_path / "a")
    again = seeded("LlamaForCausalLM")
    assert load(again, tmp_path / "a").method("default").settings() == method.settings()
    assert torch.equal(run(again), run(model))


def seeded(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny(name)


@pytest.mark.filterwarnings("ignore")  # HF PEFT's own
def test_prefixes_of_encoder_decoders_are_refused_from_hf_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
    peft.get_peft_model(tiny("T5ForConditionalGeneration"), config).save_pretrained(str(tmp_path))
    with pytest.raises(FolderError, match="half of the tensor"):
        load(tiny("T5ForConditionalGeneration"), tmp_path)


def test_the_base_may_be_bf16_and_the_prefix_stays_fp32() -> None:
    model = tiny("LlamaForCausalLM").bfloat16()
    adapters = strong(model)
    out = run(model)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {(p.dtype, p.grad.dtype) for p in adapters.parameters() if p.grad is not None} == {(torch.float32,) * 2}
    adapters.check_gradients()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_gradients_are_the_same_with_gradient_checkpointing(name: str) -> None:
    model = tiny(name, **({"dropout_rate": 0.0} if name.startswith("T5") else {})).train()
    adapters = strong(model)
    gradients = []
    for _ in range(2):
        run(model, use_cache=False).square().sum().backward()
        gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
        model.zero_grad()
        model.gradient_checkpointing_enable()
    assert len(gradients[0]) == len(adapters.parameters())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_compiled_in_one_graph_equals_eager_also_after_switching(name: str) -> None:
    model = tiny(name)
    adapters = strong(model)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled), run(model))
    adapters.activate(None)
    torch.testing.assert_close(run(compiled), run(model))


def test_plain_attention_compiles_in_one_graph() -> None:
    model = Plain(causal=True)
    strong(model)
    x = torch.randn(2, 5, 24)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_copies_and_pickles_give_the_same_and_share_nothing(name: str) -> None:
    model = tiny(name)
    adapters = strong(model, reparametrisation=5)
    expected = run(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.zero_()
    for other in copies:
        assert torch.equal(run(other), expected)


@pytest.mark.parametrize("make", [lambda: tiny("LlamaForCausalLM"), lambda: Plain(causal=False)])
def test_stacked_prefixes_stand_beside_each_other_and_rows_have_their_own(make: Any) -> None:
    model = make()
    call = (lambda m: run(m)) if hasattr(model, "config") else (lambda m: m(torch.arange(240.0).view(2, 5, 24) / 99))
    adapters = strong(model, "a")
    adapters.add(PrefixTuning(length=2, init_std=1.0), "b", seed=7)
    single = {}
    for name in ("a", "b"):
        adapters.activate(name)
        single[name] = call(model)
    adapters.activate(Rows("a", "b"))
    torch.testing.assert_close(call(model), torch.stack((single["a"][0], single["b"][1])))
    adapters.activate(Stack("a", "b"))
    stacked = call(model)
    adapters.activate(Stack("b", "a"))
    torch.testing.assert_close(call(model), stacked)
    adapters.activate(None)
    both = attach(copy.deepcopy(model), PrefixTuning(length=N + 2), "both")
    parts = [adapters.parts(name).values() for name in ("a", "b")]
    for a, b, target in zip(*parts, both.parts("both").values(), strict=True):
        with torch.no_grad():
            target.K.copy_(torch.cat((a.K, b.K)))
            target.V.copy_(torch.cat((a.V, b.V)))
    both.activate("both")
    torch.testing.assert_close(call(both.model), stacked)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [*DECODERS, "BertForSequenceClassification"])
def test_with_shifted_positions_it_is_hugging_face_pefts_prefix(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny(name)
    task = "SEQ_CLS" if "Classification" in name else "CAUSAL_LM"
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N)
    ).eval()
    theirs.save_pretrained(str(tmp_path))
    adapters = load(model, tmp_path)
    fronts = [part.front() for part in adapters.parts("default").values() if isinstance(part, PrefixAdapter)]
    saved = theirs.get_prompt_embedding_to_save("default")
    assert torch.equal(torch.cat([tensor for front in fronts for tensor in front], dim=1), saved)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(run(model, attention_mask=mask), run(theirs, attention_mask=mask), rtol=0, atol=1e-5)
    if task == "CAUSAL_LM":
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask[1:], "input_ids": IDS[1:]}
        assert torch.equal(model.generate(**options), theirs.generate(**options))


def test_what_cannot_be_given_a_prefix_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"no attention of DebertaV2For.* by itself in .*DebertaV2Attention"):
        attach(tiny("DebertaV2ForSequenceClassification"), PrefixTuning())
    with pytest.raises(TargetError, match=r"Linear computes no attention that can be reached"):
        attach(tiny("LlamaForCausalLM"), PrefixTuning(targets="*.q_proj"))
    with pytest.raises(TargetError, match="does not count its positions"):
        attach(tiny("BartForConditionalGeneration"), PrefixTuning(shift_positions=True))
    assert (
        len(attach(tiny("LlamaForCausalLM"), PrefixTuning(targets=Targets("layers.1.self_attn"))).sites("default")) == 1
    )


def test_a_call_that_the_prefix_does_not_reach_is_an_error() -> None:
    model = Plain(causal=False, fused=False)
    strong(model)
    with pytest.raises(TargetError, match="Switch its fused attention on"):
        model(torch.randn(1, 4, 24))
    llama = tiny("LlamaForCausalLM")
    strong(llama)
    llama.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(TargetError, match=r'"flex_attention".*attn_implementation="sdpa"'):
        llama.model.layers[0].self_attn(
            torch.randn(1, 4, 24), position_embeddings=(torch.ones(1, 4, 6), torch.zeros(1, 4, 6)), attention_mask=None
        )


def test_heads_that_do_not_fit_are_an_error() -> None:
    layer = Plain(causal=False)
    layer.head_dim = 5  # what it says, not what it does
    strong(layer)
    with pytest.raises(TargetError, match=r"heads x head width of 20"):
        layer(torch.randn(1, 4, 24))


def test_settings_that_cannot_be_are_refused_and_a_prefix_is_neither_merged_nor_weighted() -> None:
    for settings in ({"length": 0}, {"reparametrisation": 0}, {"init_std": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PrefixTuning(**settings)
    adapters = strong(tiny("LlamaForCausalLM"))
    with pytest.raises(NotMergeable, match="changes activations"):
        adapters.merge()
    with pytest.raises(AttachError, match="cannot be weighted"):
        adapters.activate(Weighted(default=0.5))
