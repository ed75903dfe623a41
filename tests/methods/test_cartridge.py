"""Cartridge: with its start untrained it is the text itself in front; and Hugging Face PEFT 0.21.2."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.cartridge import Cartridge
from smidgen.methods.prefix_tuning import PrefixTuning

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
TEXT = (5, 11, 3, 42, 8, 7)
IDS = torch.tensor([[3, 9, 27], [5, 4, 1]])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_untrained_it_is_the_text_itself_in_front(make: Any) -> None:
    model: Any = make().double()
    text = torch.tensor(TEXT).expand(2, -1)
    expected = model(torch.cat((text, IDS), dim=1)).logits[:, len(TEXT) :]
    adapters = attach(model, Cartridge(length=len(TEXT), init_ids=TEXT, frozen=2))
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-12)
    assert all(not part.shared.caches for part in adapters.parts("default").values())


def test_the_text_is_read_by_the_bare_model_in_eval_mode_and_cut_to_the_length() -> None:
    model: Any = llama()
    bare = attach(copy.deepcopy(model), Cartridge(length=4, init_ids=TEXT)).parameters()
    adapters = attach(model.train(), PrefixTuning(length=2, init_std=1.0), "other")
    adapters.add(Cartridge(length=4, init_ids=TEXT), "text")
    assert all(map(torch.equal, bare, adapters.parameters("text")))
    assert model.training
    assert adapters.active == "other"


def test_frozen_rows_are_not_trained_and_the_others_count_by_the_formula() -> None:
    model: Any = llama()
    adapters = attach(model, Cartridge(length=7, frozen=3), seed=0)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (2 * (7 - 3) * 16)
    part = adapters.parts("default")["model.layers.0.self_attn"]
    before = part.fixed_K.clone()
    optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
    model(IDS).logits.square().sum().backward()
    adapters.check_gradients()
    optimiser.step()
    assert torch.equal(part.fixed_K, before)


def test_a_copy_and_a_pickle_do_without_the_text() -> None:
    model: Any = llama()
    attach(model, Cartridge(length=4, init_ids=TEXT))
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("frozen", [0, 2])
def test_both_ways_with_hf_peft(make: Any, frozen: int) -> None:
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=frozen)
    adapters = from_peft(make, config)
    assert adapters.method("default").settings()["frozen"] == frozen
    says = {"num_virtual_tokens": 5, "num_frozen_tokens": frozen}
    to_peft_and_back(make, Cartridge(length=5, frozen=frozen, init_ids=TEXT), says=says)


def test_what_cannot_be_is_refused() -> None:
    for settings, match in (
        ({"length": 0}, "length is 0"),
        ({"length": 3, "frozen": 3}, "frozen is 3"),
        ({"length": 8, "init_ids": TEXT}, "init_ids are 6 tokens"),
    ):
        with pytest.raises(ConfigError, match=match):
            Cartridge(**settings)
    with pytest.raises(TargetError, match="2 layers of LlamaForCausalLM have a cache, 1 attentions"):
        attach(llama(), Cartridge(length=2, init_ids=TEXT, targets="layers.1.self_attn"))
    with pytest.raises(TargetError, match="Linear has no key/value cache"):
        attach(nn.Linear(3, 5), Cartridge(length=2, init_ids=TEXT))
