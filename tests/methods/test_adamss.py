"""AdaMSS against its equation in float64, and against Hugging Face PEFT 0.21.2."""

import itertools

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import ConfigError, FolderError
from smidgen.methods.adamss import AdaMSS

from ..formats.both_ways import from_peft, run_on, to_peft_and_back
from ..formats.models import Attention, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
RUN = run_on(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))


def with_bias() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Attention().eval()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_each_cluster_of_outputs_has_its_own_small_change(bias: bool):
    layer, x = nn.Linear(5, 7, bias=bias).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    adapters = attach(nn.Sequential(layer), AdaMSS(rank=4, subspaces=3, subspace_rank=2, targets="0"), seed=0)
    part = adapters.parts("default")["0"]
    assert torch.equal(adapters.model(x), nn.functional.linear(x, layer.weight, layer.bias))
    for A in part.A:
        torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=torch.float64), rtol=0, atol=1e-6)
    for p in part.parameters():
        nn.init.normal_(p)
    rows = torch.cat([B @ A @ part.V for A, B in zip(part.A, part.B, strict=True)])
    change = torch.stack([rows[int(place)] for place in part.places])
    expected = x @ (layer.weight + change[:, :5]).T
    if bias:
        expected += layer.bias + change[:, 5]
    torch.testing.assert_close(adapters.model(x), expected, rtol=0, atol=1e-13)
    sizes = [(len(B), B.shape[1]) for B in part.B]
    assert sum(O for O, _ in sizes) == 7
    assert sum(p.numel() for p in part.parameters()) == sum(R * (4 + O) for O, R in sizes)


def test_ranks_follow_the_singular_values_where_they_are_to():
    model = nn.Sequential(nn.Linear(16, 30))
    many = attach(model, AdaMSS(rank=9, subspaces=2, subspace_rank=9, targets="0")).parts("default")["0"]
    few = AdaMSS(rank=9, subspaces=2, subspace_rank=9, dynamic_rank=True, threshold=0.5, targets="0")
    model._smidgen_set.add(few, "few", seed=0)
    few = model._smidgen_set.parts("few")["0"]
    assert sum(len(A) for A in few.A) < sum(len(A) for A in many.A)


def trained(steps: int, **settings):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    method = AdaMSS(rank=6, subspaces=4, targets=["0", "1"], hold=0.1, settle=0.3, every=2, **settings)
    adapters = attach(model, method, seed=0)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1)
    adapters.follow(optimizer, steps)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(9, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        parts = adapters.parts("default").values()
        learning = [learns for part in parts for learns in part.importance.learns.tolist()]
        seen.append((learning, [p.detach().clone() for part in parts for p in part.B]))
    return seen


def test_subspaces_that_matter_least_stop_learning_until_the_target_is_reached():
    seen = trained(20, target_subspaces=3)
    counts = [sum(learning) for learning, _ in seen]
    assert counts[0] == 8
    assert counts[-1] == 3
    assert counts == sorted(counts, reverse=True)
    for (learning, before), (_, now) in itertools.pairwise(seen):
        assert [not torch.equal(*pair) for pair in zip(before, now, strict=True)] == learning


def test_allocation_without_steps_is_refused():
    model = attach(nn.Sequential(nn.Linear(4, 4)), AdaMSS(target_subspaces=2, targets="0")).model.train()
    with pytest.raises(ConfigError, match=r"adapters\.follow\(optimizer"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("make", "run", "config"),
    [
        (llama, None, {"r": 10, "target_modules": ["q_proj", "v_proj"]}),
        (llama, None, {"r": 50, "target_modules": ["down_proj"], "num_subspaces": 3, "subspace_rank": 4}),
        (llama, None, {"r": 9, "target_modules": ["q_proj"], "random_seed": 3, "use_asa": True}),
        (llama, None, {"r": 9, "target_modules": ["q_proj"], "subspace_rank": 5, "use_dynamic_rank": True}),
        (with_bias, RUN, {"r": 4, "target_modules": ["last"], "num_subspaces": 2}),
    ],
)
def test_folders_of_hf_peft_are_read(make, run, config):
    from_peft(make, peft.AdamssConfig(**config), **({} if run is None else {"run": run}))


def test_hf_peft_reads_ours():
    to_peft_and_back(llama, AdaMSS(rank=12, subspace_rank=2, targets=["*.q_proj", "*.v_proj"]), says={"r": 12})
    to_peft_and_back(with_bias, AdaMSS(rank=4, subspaces=2, targets="last"), run=RUN)


def test_a_file_whose_clusters_are_others_than_those_computed_here_is_refused():
    def other() -> nn.Module:
        model = llama()
        if made:
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        made.append(model)
        return model

    made: list[nn.Module] = []
    with pytest.raises(FolderError, match=r"its clusters have .* outputs, in the adapter"):
        from_peft(other, peft.AdamssConfig(r=9, target_modules=["q_proj"]))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="subspaces is 0"):
        AdaMSS(subspaces=0)
    with pytest.raises(ConfigError, match="shares of the steps that leave some"):
        AdaMSS(hold=0.5, settle=0.6)
