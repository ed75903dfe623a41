"""LoRA+'s parameter groups beside those of Hugging Face PEFT's create_loraplus_optimizer (0.21.2)."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from smidgen import IA3, AdapterSet, LoRA, Stack, attach
from smidgen.core.errors import ConfigError
from smidgen.methods.adalora import AdaLoRA
from smidgen.methods.mtl_lora import MTLLoRA

from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
TARGETS = ["q_proj", "down_proj", "embed_tokens"]
Numbers = tuple[float, float]  # learning rate and weight decay


def ours(adapters: AdapterSet, **numbers: float) -> dict[str, Numbers]:
    names = {id(p): name for name, p in adapters.named_parameters()}
    groups = adapters.parameter_groups(1e-4, weight_decay=0.02, **numbers)
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def theirs(**config: object) -> dict[str, Numbers]:
    """By our names."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS, **config))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.02
    )
    names = {id(p): name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    renamed = {
        ".lora_A.default.weight": ".A",
        ".lora_B.default.weight": ".B",
        ".lora_B.default.bias": ".bias",
        ".lora_embedding_A.default": ".A",
        ".lora_embedding_B.default": ".B",
        ".modules_to_save.default.weight": ".module.weight",
    }
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            end = next(end for end in renamed if name.endswith(end))
            found[name.removesuffix(end) + renamed[end]] = (group["lr"], group["weight_decay"])
    return found


def test_every_parameter_gets_the_rate_and_the_decay_that_peft_gives_it():
    adapters = attach(llama(), LoRA(rank=2, targets=TARGETS, heads="lm_head"))
    assert ours(adapters) == theirs(modules_to_save=["lm_head"])


def test_a_bias_on_B_is_fast_and_does_not_decay_as_in_peft():
    adapters = attach(llama(), LoRA(rank=2, targets=["q_proj"], bias_on_B=True))
    found = ours(adapters)
    expected = theirs(lora_bias=True, exclude_modules=["embed_tokens", "down_proj"])
    assert found == expected
    assert found["model.layers.0.self_attn.q_proj.bias"] == (16e-4, 0.0)


def test_ratio_and_the_rate_of_embeddings_are_what_one_says():
    found = ours(attach(llama(), LoRA(rank=2, targets=TARGETS)), ratio=4.0, embedding_learning_rate=0.5)
    assert found["model.layers.1.mlp.down_proj.A"] == (1e-4, 0.02)
    assert found["model.layers.1.mlp.down_proj.B"] == (4e-4, 0.02)
    assert found["model.embed_tokens.A"] == found["model.embed_tokens.B"] == (0.5, 0.02)


@pytest.mark.parametrize("method", [AdaLoRA(targets=["q_proj"]), MTLLoRA(targets=["q_proj"])], ids=["adalora", "mtl"])
def test_what_is_like_lora_has_a_B_too(method):
    found = ours(attach(llama(), method))
    assert {name.rpartition(".")[2] for name, (rate, _) in found.items() if rate == 16e-4} == {"B"}
    assert {rate for rate, _ in found.values()} == {1e-4, 16e-4}


def test_only_what_acts_and_is_trained_is_in_a_group():
    adapters = attach(llama(), LoRA(rank=2, targets=["q_proj"]), "one")
    adapters.add(IA3(targets=["k_proj"], feedforward=()), "two")
    adapters.add(LoRA(rank=2, targets=["v_proj"]), "three")
    adapters.activate(Stack("one", "two"))
    adapters.parts("one")["model.layers.0.self_attn.q_proj"].A.requires_grad_(False)
    found = ours(adapters)
    assert {name.split(".")[-2] + "." + name.split(".")[-1] for name in found} == {"q_proj.A", "q_proj.B", "k_proj.l"}
    assert "model.layers.0.self_attn.q_proj.A" not in found
    assert found["model.layers.0.self_attn.k_proj.l"][0] == 1e-4


def test_an_optimiser_takes_the_groups():
    model = llama()
    adapters = attach(model, LoRA(rank=2, targets=["q_proj"]))
    optimizer = torch.optim.AdamW(adapters.parameter_groups(1e-3))
    before = [p.clone() for p in adapters.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=torch.arange(1, 9)[None]).logits.square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, adapters.parameters(), strict=True))


def test_without_a_B_it_is_refused():
    with pytest.raises(ConfigError, match="no parameter is a B"):
        attach(llama(), IA3(targets=["k_proj"])).parameter_groups(1e-3)
    with pytest.raises(ConfigError, match="ratio is -1"):
        attach(llama(), LoRA(targets=["k_proj"])).parameter_groups(1e-3, ratio=-1)
