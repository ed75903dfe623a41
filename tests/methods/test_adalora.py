"""AdaLoRA against its equations in float64 and against Hugging Face PEFT 0.21.2, ranks and schedule included."""

import copy

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach, load
from smidgen.adapters import AdapterSet
from smidgen.core.errors import ConfigError
from smidgen.methods.adalora import AdaLoRA

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
STEPS = 20
ALL = Targets.of_type(nn.Linear)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def test_the_change_and_the_penalty_are_those_of_the_paper():
    model = nn.Sequential(nn.Linear(5, 4).double())
    method = AdaLoRA(rank=3, start_rank=3, alpha=6.0, targets="0", orthogonality=0.2)
    part = attach(model, method, seed=0).parts("default")["0"]
    nn.init.normal_(part.E)
    A, E, B = part.A, part.E, part.B
    change = sum(torch.outer(B[:, k], A[k]) * E[k] for k in range(3)) * 6 / (3 + 1e-5)
    torch.testing.assert_close(part.weight_delta(slice(None)), change, rtol=0, atol=1e-14)
    eye = torch.eye(3, dtype=torch.float64)
    expected = 0.2 * ((A @ A.T - eye).norm() + (B.T @ B - eye).norm()) / 2
    torch.testing.assert_close(method.penalty({"0": part}), expected)


def test_it_trains_r_times_i_plus_o_plus_1_numbers_per_site():
    adapters = attach(nn.Sequential(nn.Linear(5, 4)), AdaLoRA(rank=2, start_rank=3, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 3 * (5 + 4 + 1)


def trained(method: AdaLoRA, steps: int = STEPS) -> tuple[nn.Module, AdapterSet]:
    model = net()
    adapters = attach(model, method, seed=0)
    model.train()
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.5)
    adapters.follow(optimizer, steps)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    for _ in range(steps):
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), adapters


def ranks(adapters: AdapterSet) -> list[int]:
    return [int((part.E != 0).sum()) for part in adapters.parts("default").values()]


def test_ranks_fall_to_the_budget_and_only_those_are_saved(tmp_path):
    model, adapters = trained(AdaLoRA(rank=2, start_rank=4, targets=ALL))
    assert sum(ranks(adapters)) == 2 * 3
    adapters.save(tmp_path / "a")
    again = net()
    found = load(again, tmp_path / "a")
    assert [len(part.A) for part in found.parts("default").values()] == ranks(adapters)
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-6)


def test_the_same_triplets_are_kept_as_by_hugging_face_peft():
    torch.manual_seed(3)
    x, y, method = torch.randn(16, 6), torch.randn(16, 3), AdaLoRA(rank=2, start_rank=4, orthogonality=0.0, targets=ALL)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=16, target_modules=["0", "2", "4"], tinit=2, tfinal=6, total_step=STEPS
    )
    theirs = peft.get_peft_model(net(), config)
    model = net()
    adapters = attach(model, method, seed=0)
    model.train()
    with torch.no_grad():
        for name, part in adapters.parts("default").items():
            wrapped = theirs.base_model.model.get_submodule(name)
            for letter in "AEB":
                part.get_parameter(letter).copy_(getattr(wrapped, f"lora_{letter}")["default"])
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.5)
    adapters.follow(optimizer, STEPS)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    allocator = theirs.base_model.rankallocator
    for step in range(1, STEPS + 1):
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (theirs(x) - y).pow(2).mean().backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        other.zero_grad()
        for name, part in adapters.parts("default").items():
            wrapped = theirs.base_model.model.get_submodule(name)
            torch.testing.assert_close(part.E, wrapped.lora_E["default"], rtol=1e-4, atol=1e-7)
    assert allocator.target_bgt == sum(ranks(adapters)) == 6


def test_training_without_following_an_optimiser_is_refused():
    model = net()
    attach(model, AdaLoRA(rank=2, start_rank=4, targets=ALL)), model.train()
    with pytest.raises(ConfigError, match=r"adapters\.follow\(optimizer"):
        model(torch.randn(2, 6))


def test_a_copy_follows_nothing():
    model, _ = trained(AdaLoRA(rank=2, start_rank=4, targets=ALL))
    with pytest.raises(ConfigError, match=r"adapters.follow\(optimizer, steps=...\)"):
        copy.deepcopy(model).train()(torch.randn(2, 6))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {"init_r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32}),
        (llama, {"init_r": 3, "target_modules": "all-linear"}),
        (gpt2, {"init_r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config):
    from_peft(make, peft.AdaLoraConfig(total_step=10, target_r=2, **config))


def test_a_folder_with_allocated_ranks_is_read():
    def allocated(theirs: nn.Module) -> None:
        pattern = {}
        for name, p in theirs.named_parameters():
            if ".lora_" in name and "ranknum" not in name:
                torch.nn.init.normal_(p, std=0.1)
            if "lora_E" in name:
                mask = [True, len(pattern) % 2 == 0, False, True]
                pattern[name.removeprefix("base_model.model.")] = mask
                p.data[~torch.tensor(mask)] = 0
        theirs.peft_config["default"].rank_pattern = pattern

    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"])
    adapters = from_peft(llama, config, change=allocated)
    assert {len(part.E) for part in adapters.parts("default").values()} == {2, 3}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, AdaLoRA(rank=2, start_rank=3), says={"target_r": 2, "init_r": 3})
    to_peft_and_back(make, AdaLoRA(rank=2, start_rank=3, rank_pattern={"*.0.*": 1}))


def test_convolutions_agree_with_hf_peft():
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2))

    run = run_on(torch.randn(2, 3, 9, 9))
    to_peft_and_back(conv, AdaLoRA(rank=2, start_rank=2, targets="0"), run=run)
    from_peft(conv, peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9, target_modules=["0"]), run=run)
