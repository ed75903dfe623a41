"""An adapter takes the base's dtype in its output, and keeps its own masters in fp32 or better."""

import torch

from .cases import Case, gap
from .test_training import loss_of


def test_the_output_has_the_dtype_of_the_base_and_parameters_are_masters(stored_case: Case):
    base = stored_case.model().train(stored_case.body.fused)  # for torch's fused kernels know no autocast
    model, adapters = stored_case.attached()
    for autocast in (False, True):
        if autocast and stored_case.dtype == torch.float16:
            continue  # on a CPU, torch's autocast to bf16 does not take fp16
        for trains in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(trains):
                output = stored_case.run(model)
                assert output.dtype == stored_case.run(base).dtype
            assert torch.isfinite(output).all()
        loss_of(output).backward()
    for name, p in adapters.named_parameters():
        assert p.dtype == torch.promote_types(stored_case.dtype, torch.float32), name
        assert p.grad is not None, name
        assert p.grad.dtype == p.dtype, name


def test_a_backward_within_autocast_gives_the_gradients_of_one_without(typical_case: Case):
    found = []
    for within in (False, True):
        model, adapters = typical_case.attached()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(typical_case.run(model))
            with torch.autocast("cpu", enabled=within):
                loss.backward()
        found.append([p.grad for p in adapters.parameters("a")])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0.05, atol=0.1 * float(one.abs().max()) + 1e-6)


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
