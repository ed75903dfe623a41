"""An adapter takes the base's dtype in its output, and keeps its own masters in fp32 or better."""

import pytest
import torch

from .cases import Case, gap
from .test_training import loss_of


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_output_has_the_dtype_of_the_base_and_parameters_are_masters(stored_case: Case, autocast: bool):
    if autocast and stored_case.dtype == torch.float16:
        pytest.skip("torch's autocast on CPU does not mix bf16 with fp16")
    base = stored_case.model()
    model, adapters = stored_case.attached()
    for trains in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(trains):
            output = stored_case.run(model)
            assert output.dtype == stored_case.run(base).dtype
        assert torch.isfinite(output).all()
    loss_of(output).backward()
    for name, p in adapters.named_parameters():
        assert p.dtype == torch.promote_types(stored_case.dtype, torch.float32), name
        assert p.grad is not None and p.grad.dtype == p.dtype, name


def test_autocast_stays_near_full_precision(typical_case: Case):
    model, _ = typical_case.attached()
    expected = typical_case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert gap(typical_case.run(model), expected) < 0.1


def test_inference_gives_the_same_output_as_training_code(case: Case):
    """Without gradients torch may take fused paths that read weights and call no layer; the adapters have to act."""
    model, _ = case.attached()
    expected = case.run(model)
    with torch.no_grad():
        assert gap(case.run(model), expected) <= case.tolerance
    with torch.inference_mode():
        assert gap(case.run(model), expected) <= case.tolerance
