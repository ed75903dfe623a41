"""A number that stops being finite is found at its step and named; a signal stops a run between two steps."""

import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from smidgen.core.errors import NonFiniteError
from smidgen.training.guard import Guard, Stopper


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(3, 8, bias=False), nn.Linear(3, 8, bias=False)

    def forward(self, x):  # (B, 1, T, 3) -> (B, 1, T, 8); with three dimensions torch takes a path that hides nothing
        return nn.functional.scaled_dot_product_attention(self.query(x), self.value(x), self.value(x))


def test_nan_that_attention_hides_from_the_loss_is_found_in_the_gradients():
    model = Attention()
    with torch.no_grad():
        model.query.weight[0, 0] = math.nan
    loss = model(torch.randn(2, 1, 4, 3)).square().mean()
    if not loss.isfinite():  # not with every instruction set
        pytest.skip("this build of torch does not hide them")
    guard = Guard(model.named_parameters())
    guard.check_loss(loss, 7)
    loss.backward()
    with pytest.raises(NonFiniteError, match=r"step 7: gradients are not finite: 2 of 2 tensors: query\.weight \("):
        guard.clip_and_check(1.0)


def test_every_bad_gradient_is_named_with_its_counts():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[0].weight.grad[0, :2] = math.nan
    model[0].weight.grad[1, 0] = -math.inf
    model[1].bias.grad[1] = math.inf
    guard = Guard(model.named_parameters())
    guard.check_loss(0.5, 3)
    with pytest.raises(NonFiniteError) as caught:
        guard.clip_and_check(math.inf)
    assert str(caught.value).startswith(
        "step 3: gradients are not finite: 2 of 4 tensors: 0.weight (2 nan, 1 inf of 15), 1.bias (0 nan, 1 inf of 2). "
    )


def test_a_frozen_weight_that_is_the_cause_is_named():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    guard = Guard(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(NonFiniteError, match=r"Frozen weights are not finite either: 0\.weight \(0 nan, 1 inf of 15\)"):
        guard.clip_and_check(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match=f"step 4: the loss is {value}"):
        Guard([]).check_loss(torch.tensor(value), 4)


def test_trained_tensors_are_checked_before_anything_is_written():
    model = nn.Linear(3, 5)
    guard = Guard(model.named_parameters())
    guard.check_parameters(1)
    with torch.no_grad():
        model.bias[2] = math.nan
    with pytest.raises(
        NonFiniteError, match=r"step 2: .* nothing was saved: 1 of 2 tensors: bias \(1 nan, 0 inf of 5\)"
    ):
        guard.check_parameters(2)


@pytest.mark.parametrize("max_norm", [0.1, 1e6, math.inf])
def test_clipping_equals_that_of_torch(max_norm):
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3)
    for model in (one, other):
        model(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(one.parameters(), max_norm)
    assert Guard(other.named_parameters()).clip_and_check(max_norm) == expected.item()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_large_finite_gradients_are_clipped_and_not_refused():
    model = nn.Linear(3, 5, bias=False)
    model.weight.grad = torch.full((5, 3), 1e30)  # its square is not finite in fp32
    norm = Guard(model.named_parameters()).clip_and_check(1.0)
    assert norm == pytest.approx(1e30 * math.sqrt(15))
    assert model.weight.grad.norm().item() == pytest.approx(1.0)


def test_a_long_list_of_bad_tensors_is_cut():
    parameters = [(f"p{index}", nn.Parameter(torch.tensor([math.nan]))) for index in range(50)]
    with pytest.raises(NonFiniteError, match=r"50 of 50 tensors: p0 .* p19 \(1 nan, 0 inf of 1\) and 30 more"):
        Guard(parameters).check_parameters(1)


def test_a_signal_is_a_request_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stopper() as stopper:
        assert stopper.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.requested == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_ctrl_c_interrupts_at_once():
    with Stopper() as stopper:
        signal.raise_signal(signal.SIGINT)
        assert stopper.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_nothing_is_caught():
    handlers = []

    def run():
        with Stopper():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
