"""Compacter: the paper's sum of Kronecker products in float64, its count of parameters, and where it cannot be."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smidgen import AdapterSet, attach
from smidgen.core.errors import ConfigError, TargetError
from smidgen.methods.compacter import Compacter

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def stir(adapters: AdapterSet) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator).to(parameter)


def kronecker_sum(A: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """Equation 5, term by term."""
    return sum((torch.kron(A[i], S[i] @ T[i]) for i in range(len(A))), torch.zeros(()))


@pytest.mark.parametrize("rank", [1, 2])
def test_its_matrices_are_the_papers_sums_of_kronecker_products(rank: int) -> None:
    layer, x = nn.Linear(9, 9).double(), torch.randn(2, 4, 9, dtype=torch.float64)
    y = layer(x)
    method = Compacter(targets="0", width=6, kronecker=3, rank=rank, non_linearity="tanh", scale=0.7)
    adapters = attach(nn.Sequential(layer), method, seed=0)
    assert torch.equal(layer(x), y)
    stir(adapters)
    part = {name.rpartition(".")[2]: p for name, p in adapters.named_parameters()}
    down = kronecker_sum(part["A"], part["down_left"], part["down_right"])
    up = kronecker_sum(part["A"], part["up_left"], part["up_right"])
    assert (down.shape, up.shape) == ((9, 6), (6, 9))
    expected = y + 0.7 * (torch.tanh(y @ down + part["down_bias"]) @ up + part["up_bias"])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("placement", "per_layer"), [("both", 2), ("feedforward", 1), ("normed", 1), ("parallel", 1)])
def test_it_trains_as_many_numbers_as_the_paper_says(placement: Any, per_layer: int) -> None:
    adapters = attach(bert(), Compacter(placement=placement, reduction_factor=4, rank=2, kronecker=4))
    D, W, n, r = 32, 32 // 4, 4, 2
    assert sum(p.numel() for p in adapters.parameters()) == n**3 + 2 * per_layer * (2 * r * (D + W) + W + D)


def test_all_places_use_one_rule_and_it_learns() -> None:
    model = bert()
    adapters = attach(model, Compacter(reduction_factor=4))
    stir(adapters)
    model(torch.randint(99, (2, 5)))[0].square().sum().backward()
    adapters.check_gradients()
    rules = [name for name, _ in adapters.named_parameters() if name.endswith(".A")]
    assert rules == ["encoder.layer.0.attention.output.dense.shared.A"]


def test_the_start_is_as_large_as_that_of_a_linear_layer() -> None:
    adapters = attach(nn.Sequential(nn.Linear(512, 512)), Compacter(targets="0", width=64), seed=0)
    net: Any = adapters.parts("default")["0"].net
    size = net.matrix(net.down_left, net.down_right).std()
    assert 0.5 < size * (3 * 512) ** 0.5 < 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="width is 6; it must be a multiple of kronecker, 4"):
        Compacter(width=6)
    with pytest.raises(ConfigError, match="rank is 0"):
        Compacter(rank=0)
    with pytest.raises(TargetError, match="kronecker=5 does not divide 32 features"):
        attach(bert(), Compacter(kronecker=5))
    with pytest.raises(TargetError, match="kronecker=3 does not divide 32 features"):
        attach(bert(), Compacter(kronecker=3, placement="parallel"))
