"""OSF against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import Targets, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.osf import OSF

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_the_lesser_directions_are_replaced_and_the_greater_kept(shape):
    layer, x = nn.Linear(*shape).double(), torch.randn(4, shape[0]).double()
    adapters = attach(nn.Sequential(layer), OSF(effective_rank=2, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    U, S, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    W = U[:, :2] @ S[:2].diag() @ V[:2] + part.U @ part.S.diag() @ part.V
    torch.testing.assert_close(adapters.model(x), x @ W.T + layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_leave_the_directions_that_are_kept_alone(shape, tokens, dtype):
    """With few tokens and with many, in the base's dtype and in 16 bits."""
    layer, x = nn.Linear(*shape).to(dtype), torch.randn(tokens, shape[0], dtype=dtype, requires_grad=True)
    adapters = attach(nn.Sequential(layer), OSF(effective_rank=2, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    y = adapters.model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    U, _, V = torch.linalg.svd(layer.weight.detach().to(part.U.dtype), full_matrices=False)
    outside_U, outside_V = (torch.eye(len(kept.T)).to(kept) - kept.T @ kept for kept in (U[:, :2].T, V[:2]))
    dD, S, exact = dy.to(part.U.dtype).T @ x.detach().to(part.U.dtype), part.S.detach(), dtype == torch.float64
    expected = {
        x: dy.to(S.dtype) @ part.merged(layer.weight.to(S.dtype), None, slice(None))[0].detach(),
        part.U: outside_U @ (dD @ part.V.T) * S,
        part.S: torch.einsum("oi,om,mi->m", dD, part.U, part.V),
        part.V: S[:, None] * (part.U.T @ dD) @ outside_V,
    }
    for of, gradient in expected.items():
        gap = (of.grad.to(S.dtype) - gradient.detach()).norm() / gradient.norm()
        assert gap < (1e-12 if exact else 0.03)


@pytest.mark.parametrize("tokens", [4, 100])
def test_few_tokens_keep_two_activations_and_many_one(tokens):
    model = nn.Sequential(nn.Linear(40, 30))
    attach(model, OSF(effective_rank=20, targets="0"), seed=0)
    own, kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(tokens, 40, requires_grad=True))
    numbers = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own)
    assert numbers == tokens * (40 + 10 * (tokens == 4))


@pytest.mark.parametrize(("rank", "trained"), [(3, (5, 1)), (0.5, (4, 2)), (0.7, (3, 2))])
def test_it_trains_the_directions_that_are_not_kept(rank, trained):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    adapters = attach(model, OSF(effective_rank=rank, targets=Targets.of_type(nn.Linear)))
    assert sum(p.numel() for p in adapters.parameters()) == trained[0] * (12 + 8 + 1) + trained[1] * (8 + 4 + 1)


def test_keeping_nothing_or_all_is_refused():
    with pytest.raises(ConfigError, match=r"effective_rank is 1\.5"):
        OSF(effective_rank=1.5)
    with pytest.raises(TargetError, match="4 of its 4 singular values would be kept"):
        attach(nn.Sequential(nn.Linear(6, 4)), OSF(effective_rank=4, targets="0"))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"], "target_svd_config": {"q_proj.weight": 3}},
        {"target_modules": ["q_proj", "v_proj"], "effective_rank": 8, "rank_pattern": {r"layers\.1.*q_proj": 0.25}},
        {"target_modules": "all-linear", "effective_rank": 0.9},
    ],
    ids=str,
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.OSFConfig(**config))


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, OSF(), says={"effective_rank": 0.5, "rank_pattern": None})
    pattern = {"^model\\.layers\\.0\\.self_attn\\.q_proj$": 5, "^model\\.layers\\.1\\.self_attn\\.q_proj$": 0.75}
    method = OSF(effective_rank=9, effective_rank_pattern={"*.0.*.q_proj": 5, "*.1.*.q_proj": 0.75}, targets="*.q_proj")
    to_peft_and_back(llama, method, says={"effective_rank": 9, "rank_pattern": pattern})
