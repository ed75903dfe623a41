"""An adapter takes the base's dtype in its output, and keeps its own masters in fp32 or better."""

import pytest
import torch

from .cases import Case, gap
from .test_training import loss_of


def test_parameters_are_masters_in_fp32_or_better(stored_case: Case):
    _, adapters = stored_case.attached()
    for name, p in adapters.named_parameters():
        assert p.dtype == torch.promote_types(stored_case.dtype, torch.float32), name


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_the_output_has_the_dtype_of_the_base(stored_case: Case, autocast: bool, trains: bool):
    base = stored_case.model()
    model, adapters = stored_case.attached()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            expected = stored_case.run(base).dtype
        except RuntimeError:
            return  # the base itself cannot
        with torch.set_grad_enabled(trains):
            output = stored_case.run(model)
    assert output.dtype == expected
    assert torch.isfinite(output).all()
    if trains:
        loss_of(output).backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapters.parameters())


def test_autocast_stays_near_full_precision(case: Case):
    model, _ = case.attached()
    expected = case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert gap(case.run(model), expected) < 0.1


def test_inference_gives_the_same_output_as_training_code(case: Case):
    """Without gradients torch may take fused paths that read weights and call no layer; the adapters have to act."""
    model, _ = case.attached()
    expected = case.run(model)
    with torch.no_grad():
        assert gap(case.run(model), expected) <= case.tolerance
    with torch.inference_mode():
        assert gap(case.run(model), expected) <= case.tolerance
