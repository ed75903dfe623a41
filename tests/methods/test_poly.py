"""Poly against its formula in float64, and against Hugging Face PEFT 0.21.2."""

import peft
import pytest
import torch
from torch import nn

from smidgen import attach
from smidgen.core.errors import AttachError, TargetError
from smidgen.core.tasks import for_tasks
from smidgen.methods.poly import Poly

from ..formats.both_ways import from_peft, to_peft_and_back
from ..formats.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")  # HF PEFT's own
IDS = torch.tensor([[3, 9, 4, 1], [8, 2, 2, 7]])


class Model(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)


def run_tasks(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, task_ids=torch.tensor([2, 0])).logits


def attached(**settings):
    layer = nn.Linear(4, 6).double()
    adapters = attach(Model(layer), Poly(rank=3, skills=2, targets="0", **settings), seed=0)
    for p in adapters.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return layer, adapters.parts("default")["0"], adapters.model.eval()


@torch.no_grad()
@pytest.mark.parametrize("splits", [1, 2])
def test_each_row_has_its_tasks_mixture_of_skills(splits: int):
    layer, part, model = attached(tasks=3, splits=splits)
    x, tasks = torch.randn(4, 2, 4, dtype=torch.float64), [2, 0, 2, 1]
    out = model(x, task_ids=torch.tensor(tasks))
    for row, task in enumerate(tasks):
        A, B = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
        for q in range(splits):
            z = torch.sigmoid(part.logits[task, 2 * q : 2 * q + 2])
            z = z / z.sum()
            for s in range(2):
                A[q * 4 // splits : (q + 1) * 4 // splits] += z[s] * part.A[q, s]
                B[:, q * 6 // splits : (q + 1) * 6 // splits] += z[s] * part.B[q, s]
        expected = x[row] @ layer.weight.T + layer.bias + x[row] @ A @ B / 3
        torch.testing.assert_close(out[row], expected, rtol=0, atol=1e-13)


def test_a_single_task_needs_no_ids_and_merges():
    layer, _, model = attached()
    x = torch.randn(2, 4, dtype=torch.float64)
    expected, before = model(x), layer.weight.clone()
    model._smidgen_set.merge()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


def test_parameters_are_those_of_skills_and_routes():
    _, part, _ = attached(tasks=5, splits=2)
    N, Q, S, R = 5, 2, 2, 3
    assert sum(p.numel() for p in part.parameters()) == S * R * (4 + 6) + N * Q * S


def test_routes_are_drawn_while_training_and_only_then():
    _, part, model = attached()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    part.sampled = False
    assert torch.equal(model(x), model(x))


def test_the_mean_of_drawn_routes_is_that_of_a_relaxed_bernoulli():
    torch.default_generator.manual_seed(0)
    distribution = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=torch.full((20000,), 0.7))
    u = torch.rand(20000).clamp(1e-6, 1 - 1e-6)
    assert abs(torch.sigmoid(0.7 + u.logit()).mean() - distribution.sample().mean()) < 0.01


def test_repeated_rows_belong_to_the_row_they_come_from_also_when_generating():
    model = llama()
    adapters = attach(model, Poly(tasks=3, targets="*.q_proj"), seed=0)
    for p in adapters.parameters():
        nn.init.normal_(p, std=0.3)
    model.eval()
    tasks = torch.tensor([2, 0])
    with for_tasks(model, tasks):
        both = model.generate(IDS, max_new_tokens=3, num_beams=2, do_sample=False)
    for row in range(2):
        with for_tasks(model, tasks[row : row + 1]):
            alone = model.generate(IDS[row : row + 1], max_new_tokens=3, num_beams=2, do_sample=False)
        assert torch.equal(both[row], alone[0])


def test_what_is_missing_or_cannot_be_is_said():
    _, _, model = attached(tasks=3)
    x = torch.randn(4, 4, dtype=torch.float64)
    with pytest.raises(AttachError, match="which of the 3 tasks"):
        model(x)
    with pytest.raises(AttachError, match=r"task_ids are \[0, 3\]; the tasks are 0 to 2"):
        model(x, task_ids=torch.tensor([0, 3, 0, 0]))
    with pytest.raises(AttachError, match="names 3 rows, the batch has 4"):
        model(x, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(AttachError, match="no adapter of several tasks"), for_tasks(nn.Linear(2, 2), x):
        pass
    with pytest.raises(TargetError, match="cannot be cut into 4 splits"):
        attached(splits=4)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "n_tasks": 3, "n_skills": 2, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 4, "target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_folders_of_hf_peft_are_read(config):
    from_peft(llama, peft.PolyConfig(task_type="CAUSAL_LM", **config), run=run_tasks)


def test_hf_peft_reads_ours():
    method = Poly(rank=4, tasks=3, skills=2, splits=2, targets=["*.q_proj", "*.v_proj"])
    to_peft_and_back(llama, method, run=run_tasks, says={"n_tasks": 3, "n_skills": 2, "n_splits": 2})
