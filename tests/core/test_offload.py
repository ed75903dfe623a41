"""Offload: what leaves, when it is back, and which buffers are used again; with a side that copies at once."""

import pytest
import torch
from torch import Tensor, nn

from smidgen.core.offload import CudaSide, Offloader
from smidgen.core.recompute import recompute

from .test_recompute import assert_equal, gradients, tower


class FakeSide:
    """Writes down what it is asked for.  What was sent away is spoiled, so that nobody reads it by mistake."""

    def __init__(self):
        self.said: list[str] = []
        self.buffers: list[Tensor] = []
        self.not_arrived: set[int] = set()

    def number(self, buffer: Tensor) -> int:
        return next(i for i, other in enumerate(self.buffers) if other is buffer)

    def buffer(self, like: Tensor) -> Tensor:
        self.buffers.append(torch.empty_like(like))
        return self.buffers[-1]

    def send(self, tensor: Tensor, buffer: Tensor) -> None:
        buffer.copy_(tensor)
        self.said.append(f"out {self.number(buffer)}")

    def fetch(self, buffer: Tensor) -> Tensor:
        self.said.append(f"in {self.number(buffer)}")
        back = buffer.clone()
        self.not_arrived.add(id(back))
        return back

    def arrived(self, tensor: Tensor) -> None:
        self.not_arrived.remove(id(tensor))


def through(offloader: Offloader, x: Tensor, count: int = 4) -> Tensor:
    """A chain whose every link keeps its input: x_{i+1} = sin x_i."""
    with torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack):
        for _ in range(count):
            x = x.sin()
    return x


def test_the_next_tensor_sets_out_while_the_one_before_it_is_used():
    side, x = FakeSide(), torch.randn(3, 5, requires_grad=True)
    offloader = Offloader(side, least_bytes=0)
    through(offloader, x).sum().backward()
    assert side.said == ["out 0", "out 1", "out 2", "out 3", "in 3", "in 2", "in 1", "in 0"]
    assert side.not_arrived == set()  # everything was waited for
    found, x.grad = x.grad, None
    for _ in range(1):
        y = x.sin().sin().sin().sin()
    y.sum().backward()
    assert torch.equal(found, x.grad)


def test_two_at_most_are_back_at_once():
    side, x = FakeSide(), torch.randn(3, 5, requires_grad=True)
    fetched, most = Offloader(side, least_bytes=0), []

    def arrived(tensor: Tensor) -> None:
        side.not_arrived.remove(id(tensor))
        most.append(1 + len(side.not_arrived))  # the one that is asked for, and those on their way

    side.arrived = arrived
    through(fetched, x, 6).sum().backward()
    assert most == [2, 2, 2, 2, 2, 1]


def test_buffers_are_used_again_from_step_to_step():
    side, x = FakeSide(), torch.randn(3, 5, requires_grad=True)
    offloader = Offloader(side, least_bytes=0)
    for _ in range(3):
        through(offloader, x).sum().backward()
    assert len(side.buffers) == 4
    through(offloader, x)  # never asked for: the graph is dropped
    assert len(offloader.free[x.shape, x.dtype]) == 4


def test_what_is_small_or_needs_no_gradient_stays():
    side, x = FakeSide(), torch.randn(3, 5, requires_grad=True)
    through(Offloader(side, least_bytes=61), x).sum().backward()  # each has 60
    mask = torch.randn(3, 5)
    with torch.autograd.graph.saved_tensors_hooks(Offloader(side, 0).pack, lambda packed: packed):
        x * mask
    assert side.said == []


def test_a_backward_may_be_repeated():
    side, x = FakeSide(), torch.randn(3, 5, requires_grad=True)
    y = through(Offloader(side, least_bytes=0), x).sum()
    y.backward(retain_graph=True)
    found, x.grad = x.grad, None
    y.backward()
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("trained", [True, False])
def test_recomputing_blocks_send_their_inputs_away(monkeypatch, trained):
    """Of three blocks; where nothing below is trained, the first block's input needs no gradient and stays."""
    model, x = tower(), torch.randn(5, 6, requires_grad=trained)
    plain = gradients(model, lambda m: m(x).square().mean())
    side = FakeSide()
    offloader = Offloader(side, least_bytes=0)

    def away(device: torch.device):
        return torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack)

    monkeypatch.setattr("smidgen.core.recompute.away", away)
    monkeypatch.setattr("smidgen.core.recompute.refuse_offload", lambda device: None)
    with recompute(model, "all", offload="cpu"):
        assert_equal(gradients(model, lambda m: m(x).square().mean()), plain)
    count = 3 if trained else 2
    assert side.said == [*(f"out {i}" for i in range(count)), *(f"in {i}" for i in reversed(range(count)))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between a GPU and pinned memory need a GPU")
def test_on_a_gpu_gradients_are_the_same_and_memory_is_freed():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(8)).cuda()
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)

    def loss(model):
        h = x
        for block in model:
            h = block(h)
        return h.square().mean()

    plain = gradients(blocks, loss)
    kept = {}
    for offload in ("off", "cpu"):
        with recompute(blocks, "all", blocks=map(str, range(8)), offload=offload):
            assert_equal(gradients(blocks, loss), plain)
            before = torch.cuda.memory_allocated()
            graph = loss(blocks)
            torch.cuda.synchronize()
            kept[offload] = torch.cuda.memory_allocated() - before
            del graph
    assert kept["off"] - kept["cpu"] >= 6 * x.nbytes
    assert CudaSide(torch.device("cuda")).buffer(x).is_pinned()
