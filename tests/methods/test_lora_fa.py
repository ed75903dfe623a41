"""LoRA-FA: what is trained, what is kept for backward, and its folder."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smidgen import Targets, attach
from smidgen.adapters import load
from smidgen.core.errors import ConfigError
from smidgen.methods.lora import LoRA
from smidgen.methods.lora_fa import LoRAFA

from ..formats.both_ways import to_peft_and_back
from ..formats.models import llama


def test_it_computes_the_formula_of_the_paper_and_trains_B_alone():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    base = layer(x)
    adapters = attach(layer, LoRAFA(rank=2, alpha=3.0, targets=""))
    (part,) = adapters.parts("default").values()
    assert torch.equal(layer(x), base)
    assert [name for name, _ in part.named_parameters()] == ["B"]
    assert sum(p.numel() for p in adapters.parameters()) == 2 * 5
    with torch.no_grad():
        part.B.normal_()
    torch.testing.assert_close(layer(x), base + 1.5 * x @ part.A.T @ part.B.T)


def test_A_is_orthonormal_so_that_the_gradient_of_B_is_the_projected_one():
    """HF PEFT's optimiser multiplies it by (A A^T)^-1 / s^2."""
    (part,) = attach(nn.Linear(40, 5), LoRAFA(rank=8, targets=""), seed=0).parts("default").values()
    torch.testing.assert_close(part.A @ part.A.T, torch.eye(8))
    (experts,) = _experts().parts("default").values()
    for A in experts.A.view(3, 2, 4):
        torch.testing.assert_close(A @ A.T, torch.eye(2))


def _experts():
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(3, 5, 4))
    return attach(nn.ModuleDict({"experts": layer}), LoRAFA(rank=2, targets=Targets("experts").parameter("weight")))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_layer_keeps_its_input(dropout: float):
    def kept(method: type[LoRA]) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        attach(model, method(rank=2, dropout=dropout, targets=["0", "1"])).parts("default")
        x, sizes = torch.randn(128, 64, requires_grad=True), []

        def size(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape == x.shape and tensor.is_floating_point() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(size, lambda tensor: tensor):
            model.train()(x)
        return sum(sizes)

    masks = 2 * 128 * 64 if dropout else 0  # torch's dropout may keep its mask as numbers
    assert kept(LoRAFA) <= masks
    assert kept(LoRA) > 0


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it_as_a_plain_lora(tmp_path: Path):
    to_peft_and_back(llama, LoRAFA(rank=4, targets="*.q_proj"), says={"peft_type": "LORA", "r": 4})
    model = llama()
    adapters = attach(model, LoRAFA(rank=4, targets="*.q_proj"))
    adapters.save(tmp_path / "a")
    assert isinstance(load(llama(), tmp_path / "a").method("default"), LoRAFA)


def test_it_has_a_start_of_its_own():
    with pytest.raises(ConfigError, match='start is "pissa"; it is one of kaiming'):
        LoRAFA(start="pissa")


def test_a_rank_above_the_fan_in_is_possible():
    (part,) = attach(nn.Linear(3, 5), LoRAFA(rank=4, targets="")).parts("default").values()
    assert math.isclose(float(part.A.square().sum()), 3, rel_tol=1e-5)
