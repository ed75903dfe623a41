"""aLoRA: it acts from the invocation on, as a LoRA there; and as Hugging Face PEFT 0.21.2 has it."""

import peft
import pytest
import torch
from torch import nn

from smidgen import LoRA, Rows, Stack, attach
from smidgen.core.errors import AttachError, ConfigError, TargetError
from smidgen.methods.alora import ALoRA

from ..formats.both_ways import from_peft, run_text, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own

IDS = torch.tensor([[3, 7, 8, 4, 7, 8, 5], [7, 8, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]])  # from token 4, 0 and never
STARTS = (4, 0, 7)


def noisy(adapters) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapters.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def invoked(**settings) -> nn.Module:
    model = llama()
    noisy(attach(model, ALoRA(rank=2, invocation_tokens=(7, 8), **settings), seed=0))
    return model


@torch.no_grad()
def test_before_the_invocation_it_is_the_base_model_and_from_it_on_a_lora():
    model, lora, base = invoked(), llama(), llama()
    noisy(attach(lora, LoRA(rank=2), seed=0))
    before, after, out = base(IDS).logits, lora(IDS).logits, model(IDS).logits
    for row, start in enumerate(STARTS):
        assert torch.equal(out[row, :start], before[row, :start])
    torch.testing.assert_close(out[1], after[1], rtol=0, atol=1e-6)  # from its first token on
    assert (out[0, 4:] - before[0, 4:]).abs().max() > 1e-3


@torch.no_grad()
def test_the_cache_of_the_base_model_serves_it():
    model = invoked()
    whole = model(IDS[:1]).logits
    adapters = model.__dict__["_smidgen_set"]
    adapters.activate(None)
    cache = model(IDS[:1, :4], use_cache=True).past_key_values
    adapters.activate("default")
    rest = model(IDS[:1, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_goes_on_as_the_row_began(beams: int):
    model = invoked()
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    for row in range(3):
        ids = IDS[row : row + 1]
        with_cache = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


def test_a_cache_that_another_row_began_is_not_gone_on_with():
    model = invoked()
    base = llama()
    with torch.no_grad():
        model(IDS[1:2], use_cache=True)  # invoked
        cache, same = (m(IDS[2:], use_cache=True).past_key_values for m in (base, base))
        out = model(torch.tensor([[9]]), past_key_values=cache).logits
        assert torch.equal(out, base(torch.tensor([[9]]), past_key_values=same).logits)


def test_it_trains_as_many_numbers_as_lora():
    count = sum(p.numel() for p in attach(llama(), ALoRA(rank=2, invocation_tokens=(7,))).parameters())
    assert count == sum(p.numel() for p in attach(llama(), LoRA(rank=2)).parameters())


@torch.no_grad()
def test_rows_and_stacks_with_other_methods():
    model = invoked()
    adapters = model.__dict__["_smidgen_set"]
    adapters.add(LoRA(rank=2), "lora", seed=3)
    alone = {}
    for name in ("default", "lora", None):
        adapters.activate(name)
        alone[name] = model(IDS).logits
    adapters.activate(Rows("default", None, "lora"))
    out = model(IDS).logits
    for row, name in enumerate(("default", None, "lora")):
        torch.testing.assert_close(out[row], alone[name][row], rtol=0, atol=1e-6)
    adapters.activate(Stack("lora", "default"))
    torch.testing.assert_close(model(IDS).logits[2], alone["lora"][2], rtol=0, atol=1e-6)  # never invoked


def test_checkpointed_layers_get_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = invoked()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.__dict__["_smidgen_set"].parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0 or (other == 0).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="are ids of tokens"):
        ALoRA(invocation_tokens=(-1,))
    with pytest.raises(TargetError, match="from some tokens on; say which"):
        attach(llama(), ALoRA())
    with pytest.raises(TargetError, match="takes no input_ids"):
        attach(nn.Sequential(nn.Linear(3, 3)), ALoRA(invocation_tokens=(1,), targets="0"))
    model = invoked()
    with pytest.raises(AttachError, match="the call has none"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "alora_invocation_tokens": [4, 5]}),
        (llama, {"target_modules": ["q_proj", "lm_head"], "alora_invocation_tokens": [9], "use_rslora": True}),
        (gpt2, {"target_modules": ["c_attn"], "alora_invocation_tokens": [2, 3], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    adapters = from_peft(make, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **config), run=_with_ids)
    assert adapters.method("default").invocation_tokens == tuple(config["alora_invocation_tokens"])


def _with_ids(model: nn.Module) -> torch.Tensor:
    return torch.cat([run_text(model)[0], model(input_ids=torch.tensor([[4, 5, 1, 9, 2, 3, 4, 5]])).logits[0]])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    says = {"alora_invocation_tokens": [4, 5], "task_type": "CAUSAL_LM"}
    to_peft_and_back(make, ALoRA(rank=2, invocation_tokens=(4, 5)), says=says, run=_with_ids)
