"""MonteCLoRA against torch's distributions, and against Hugging Face PEFT 0.21.2 for the same samples."""

import peft
import pytest
import torch
from peft.tuners.lora.config import MontecloraConfig
from torch import nn
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

from smidgen import attach
from smidgen.methods.monteclora import MonteCLoRA, MonteCLoRAAdapter

from ..formats.both_ways import from_peft, gap, to_peft_and_back
from ..formats.models import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))


def one(**settings) -> tuple[nn.Module, MonteCLoRAAdapter]:
    model = layers()
    adapters = attach(model, MonteCLoRA(rank=3, samples=4, targets="0", **settings), seed=0)
    part = adapters.parts("default")["0"]
    nn.init.normal_(part.B)
    return model, part


@torch.no_grad()
def test_it_samples_in_training_and_is_a_lora_after():
    model, part = one(sample_scale=0.5)
    x = torch.randn(3, 7)
    expected = model[0].smidgen.get("default").scale * x @ part.A.T @ part.B.T
    model.eval()
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model[0](x), base + expected)
    model.train()
    assert gap(model[0](x), model[0](x)) > 1e-3
    changed = part.weight_delta(slice(None))
    torch.testing.assert_close(changed, part.scale * part.B @ part.A)


@torch.no_grad()
def test_the_samples_have_the_papers_moments():
    model, part = one(sample_scale=0.5)
    model.train()
    nn.init.zeros_(part.u)
    drawn = torch.stack([part._sampled() - part.A for _ in range(4000)])  # (4000, R, I)
    assert drawn.mean().abs() < 0.02
    # E|p|^2 from the draws themselves; w has mean R
    weights = torch.stack([(part._draw(), part._weights())[1] for _ in range(4000)])
    expected = 0.25 * (2 * part.t).exp() * part.rank * weights.square().sum(1).mean()
    torch.testing.assert_close(drawn.square().mean((0, 2)), expected, rtol=0.1, atol=0)


def test_the_penalty_is_made_of_divergences():
    _, part = one()
    part = part.double()
    part.w.copy_(torch.tensor([0.5, 1.0, 2.0]))
    method = MonteCLoRA(rank=3, samples=4, kl_weight=2.0, dirichlet_prior=0.3)
    scales = (2 * part.t).exp()
    of_p = kl_divergence(Dirichlet(part.u.exp()), Dirichlet(torch.full_like(part.u, 0.3)))
    zero = torch.zeros_like(part.t)
    of_E = kl_divergence(
        MultivariateNormal(zero, (scales * part.w).diag()), MultivariateNormal(zero, torch.eye(3, dtype=zero.dtype))
    )
    of_w = 0.5 * 3 * (scales - scales.log() - 1).sum()
    torch.testing.assert_close(part.penalty(method), 2.0 * (of_p + of_w + 4 * of_E))


def test_it_trains_a_number_per_rank_and_sample_more_than_lora():
    adapters = attach(layers(), MonteCLoRA(rank=2, samples=4, targets="0"))
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (7 + 6 + 1) + 4


def test_training_gives_hf_pefts_outputs_and_gradients_for_its_samples(monkeypatch):
    config = MontecloraConfig(num_samples=4, sample_scaler=0.3, buffer_size=2)
    theirs = peft.get_peft_model(
        layers(), peft.LoraConfig(target_modules=["0", "1"], r=3, lora_alpha=3, monteclora_config=config)
    ).train()
    ours = layers()
    adapters = attach(ours, MonteCLoRA(rank=3, alpha=3, samples=4, sample_scale=0.3, targets=("0", "1")), seed=0)
    ours.train()
    pairs, samplers = [], {}
    for path, part in adapters.parts("default").items():
        their = theirs.base_model.model.get_submodule(path)
        sampler = samplers[id(part)] = their.lora_monteclora_sampler.default
        pairs += [(part.A, their.lora_A.default.weight), (part.B, their.lora_B.default.weight)]
        pairs += [(part.t, sampler.std_prior), (part.u, sampler.expert_weights_prior)]

    def draw(part: MonteCLoRAAdapter) -> torch.Tensor:
        drawn = samplers[id(part)].sampler.buffer[0]
        part.w.copy_(drawn["z_wishart"].diag())
        part.z.copy_(drawn["z_dirichlet"])
        return drawn["z_mvn"].mT

    monkeypatch.setattr(MonteCLoRAAdapter, "_draw", draw)
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own.normal_())
    x, outs = torch.randn(8, 7), []
    for model in (ours, theirs):
        outs.append(model(x))
        outs[-1].square().sum().backward()
    assert gap(*outs) < 1e-6
    for own, their in pairs:
        assert gap(own.grad, their.grad) < 1e-4


@pytest.mark.parametrize(
    ("make", "config", "settings"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"], "r": 4}, {"num_samples": 3, "use_entropy": True}),
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"kl_loss_weight": 0.5}),
    ],
)
def test_folders_of_hf_peft_are_read(make, config, settings):
    settings = {"buffer_size": 1, **settings}
    adapters = from_peft(make, peft.LoraConfig(monteclora_config=MontecloraConfig(**settings), **config))
    method = adapters.method("default")
    assert (method.samples, method.kl_weight) == (settings.get("num_samples", 8), settings.get("kl_loss_weight", 1e-5))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_hf_peft_reads_ours(make):
    to_peft_and_back(make, MonteCLoRA(rank=2, samples=3, entropy=True))
