"""ShadowPEFT against its equations in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smidgen import Targets, attach, load
from smidgen.core.errors import AttachError, ConfigError, FolderError, TargetError
from smidgen.methods.shadow import Shadow

from ..formats.both_ways import from_peft, gap, to_peft_and_back
from ..formats.models import llama, llama_classifier

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
IDS = torch.tensor([[3, 9, 4, 1], [8, 2, 2, 7]])


def attached(make=llama, **settings):
    model = make()
    adapters = attach(model, Shadow(**{"rank": 3, "alpha": 0.7, "dropout": 0.0, **settings}), seed=0)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model, adapters


@torch.no_grad()
def test_blocks_read_what_the_shadow_corrects_and_the_shadow_follows_what_they_give():
    model, adapters = attached(lambda: llama().double(), update_width=5)
    parts = adapters.parts("default")
    shared = parts[""].shared
    seen = {}
    for i in range(2):
        block = model.model.layers[i]
        call = type(block).base_class.forward
        block.__dict__["_smidgen_lifted_forward"] = lambda h, *args, b=block, c=call, i=i, **kw: seen.setdefault(
            i, (h, c(b, h, *args, **kw))
        )[1]
    model(input_ids=IDS)
    s = shared.backbone(inputs_embeds=model.model.embed_tokens(IDS), use_cache=False)[0]
    h = model.model.embed_tokens(IDS)
    for i in range(2):
        part = parts[f"model.layers.{i}"]
        corrected = h + 0.7 * (h - s) @ part.D.T @ part.U.T
        torch.testing.assert_close(seen[i][0], corrected, rtol=0, atol=1e-12)
        h = seen[i][1]
        if i == 0:
            u = shared.updates[0]
            t, g = (
                F.gelu(h @ u.get_parameter(f"{n}_in").T + u.get_parameter(f"{n}_in_bias"))
                @ u.get_parameter(f"{n}_out").T
                + u.get_parameter(f"{n}_out_bias")
                for n in "TG"
            )
            s = (1 - g.sigmoid()) * s + g.sigmoid() * t
    assert len(shared.updates) == 1


def test_parameters_are_those_of_the_small_model_the_bottlenecks_and_the_updates():
    _, adapters = attached(update_width=5)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32
    assert sum(p.numel() for p in adapters.parameters()) == layer + 32 + 2 * (2 * 3 * 32) + 2 * (2 * 5 * 32 + 5 + 32)


def test_it_starts_as_the_base_model_whatever_the_shadow_says():
    model = llama()
    expected = model(input_ids=IDS).logits
    attach(model, Shadow(), seed=0)
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_learn_the_same(reentrant: bool):
    found = []
    for checkpointed in (False, True):
        model, adapters = attached(lambda: llama_of(3))
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS).logits.square().sum().backward()
        adapters.check_gradients()
        found.append({name: p.grad for name, p in adapters.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def llama_of(layers: int) -> nn.Module:
    import transformers

    torch.default_generator.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config)


def test_generation_with_a_cache_gives_what_it_gives_without():
    model, _ = attached()
    base = llama().generate(IDS, max_new_tokens=6, do_sample=False, num_beams=2)
    cached = model.generate(IDS, max_new_tokens=6, do_sample=False, num_beams=2)
    assert torch.equal(cached, model.generate(IDS, max_new_tokens=6, do_sample=False, num_beams=2, use_cache=False))
    assert not torch.equal(cached, base)
    out = model(input_ids=IDS, use_cache=True)
    with pytest.raises(AttachError, match="an empty DynamicCache"):
        model(input_ids=IDS[:, :1], past_key_values=out.past_key_values)


def test_hidden_states_that_are_asked_for_are_the_models_own():
    model, _ = attached()
    out = model(input_ids=IDS, output_hidden_states=True)
    assert {h.shape[-1] for h in out.hidden_states} == {32}
    assert len(out.hidden_states) == 3


def test_labels_train_the_shadow_as_well():
    model, adapters = attached(auxiliary_weight=0.5)
    evaluated = model(input_ids=IDS, labels=IDS).loss
    model.train()
    state = adapters.parts("default")[""].shared.running.value
    own = F.cross_entropy(model.lm_head(state)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, evaluated + 0.5 * own)


@torch.no_grad()
def _moved(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "shadow_" in name and "norm" not in name:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "shadow_alpha": 1.0},
        {"r": 4, "shadow_num_hidden_layers": 2, "update_hidden_size": 6, "shadow_intermediate_size": 20},
        {"r": 4, "shadow_alpha": 1.0, "shadow_hidden_size": 16, "shadow_num_attention_heads": 2},
        {"r": 4, "share_embeddings": False, "target_modules": ["layers.1"]},
    ],
)
def test_folders_of_hf_peft_are_read(settings):
    from_peft(llama, peft.ShadowConfig(task_type="CAUSAL_LM", **settings), change=_moved)


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, Shadow(rank=4, alpha=1.0, layers=2), says={"r": 4, "shadow_num_hidden_layers": 2})
    to_peft_and_back(llama, Shadow(rank=4, alpha=1.0, width=16, attention_heads=4))


def test_a_classifiers_shadow_stays_with_us(tmp_path):
    model, adapters = attached(llama_classifier)
    adapters.save(tmp_path / "ours")
    other = llama_classifier()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "smidgen" not in k})
    load(other, tmp_path / "ours")
    assert gap(other(input_ids=IDS).logits, model(input_ids=IDS).logits) < 1e-6


def test_a_classifiers_folder_of_hf_peft_is_refused(tmp_path):
    theirs = peft.get_peft_model(llama_classifier(), peft.ShadowConfig(task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(FolderError, match="shadow_head"):
        load(llama_classifier(), tmp_path)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="width is 0"):
        Shadow(width=0)
    with pytest.raises(TargetError, match="one behind another"):
        attach(llama_of(3), Shadow(targets=["layers.0", "layers.2"]))
    with pytest.raises(TargetError, match="no hidden states to read"):
        attach(nn.Sequential(nn.Linear(2, 2)), Shadow())
    with pytest.raises(TargetError, match="follows whole blocks"):
        attach(llama(), Shadow(targets=Targets.of_type(nn.Linear)))
