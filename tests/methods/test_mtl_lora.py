"""MTL-LoRA against its equations in float64, task by task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import AdapterSet, attach
from smidgen.adapters import load
from smidgen.core.errors import AttachError, ConfigError, NotMergeable
from smidgen.core.tasks import for_tasks
from smidgen.methods.mtl_lora import MTLLoRA


class Two(nn.Module):
    """Two linear layers; input (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


X = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SETTINGS: dict[str, Any] = {"tasks": 3, "rank": 2, "alpha": 3.0, "mixtures": 2, "targets": ["first", "second"]}


def adapted(**settings: Any) -> tuple[nn.Module, AdapterSet]:
    model = Two().double()
    adapters = attach(model, MTLLoRA(**{**SETTINGS, **settings}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapters.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (name != ""))
    return model, adapters


def by_hand(adapters: AdapterSet, x: Tensor, task: int) -> Tensor:
    base = Two().double()
    for name in ("first", "second"):
        part = adapters.parts("default")[name]
        weights = torch.exp(part.w[task] / 0.5) / torch.exp(part.w[task] / 0.5).sum()
        B = sum(weights[i] * part.B[i] for i in range(2))
        getattr(base, name).weight.data += (1.5 * B @ part.L[task] @ part.A).detach()
    return base(x)


def test_each_row_computes_the_formula_of_its_task():
    model, adapters = adapted()
    out = model(X, task_ids=torch.tensor([2, 0, 2, 1]))
    for row, task in enumerate([2, 0, 2, 1]):
        torch.testing.assert_close(out[row], by_hand(adapters, X[row], task))
    with for_tasks(model, torch.tensor([1, 1, 1, 1])):
        torch.testing.assert_close(model(X), by_hand(adapters, X, 1))


def test_one_task_for_all_rows_needs_no_word_and_merges():
    model, adapters = adapted(task=2)
    expected = by_hand(adapters, X, 2)
    torch.testing.assert_close(model(X), expected)
    adapters.merge()
    torch.testing.assert_close(model(X), expected)


def test_it_starts_from_the_base_model_and_counts_as_said():
    model = Two().double()
    base = model(X)
    adapters = attach(model, MTLLoRA(**SETTINGS))
    assert torch.equal(model(X, task_ids=torch.tensor([0, 1, 2, 0])), base)
    sites = {"first": (5, 6), "second": (4, 5)}
    assert sum(p.numel() for p in adapters.parameters()) == sum(
        2 * (I + 2 * O) + 3 * (2**2 + 2) for O, I in sites.values()
    )


def test_it_is_saved_and_loaded(tmp_path: Path):
    model, adapters = adapted()
    adapters.save(tmp_path / "a")
    again = Two().double()
    load(again, tmp_path / "a")
    ids = torch.tensor([2, 0, 2, 1])
    assert torch.equal(again(X, task_ids=ids), model(X, task_ids=ids))


def test_what_cannot_be_is_said():
    model, adapters = adapted()
    with pytest.raises(AttachError, match="which of the 3 tasks"):
        model(X)
    with pytest.raises(AttachError, match="the tasks are 0 to 2"):
        model(X, task_ids=torch.tensor([3, 0, 0, 0]))
    with pytest.raises(AttachError, match="task_ids names 3 rows, the batch has 4"):
        model(X, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(NotMergeable):
        adapters.merge()
    with pytest.raises(ConfigError, match="task is 3; of 3 tasks it is 0 to 2"):
        MTLLoRA(tasks=3, task=3)
    with pytest.raises(ConfigError, match="temperature is 0"):
        MTLLoRA(temperature=0.0)
