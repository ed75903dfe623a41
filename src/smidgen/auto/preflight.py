"""Checks in seconds, before the run: what would fail or learn nothing is found here, and nothing has been trained yet.

Two backward passes decide: at the start, and with every adapter parameter moved a little.  A parameter that gets no
gradient in either never will; one that gets none only at the start (LoRA's A while B is zero) is as it should be.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterSet
from ..core.errors import PreflightError
from ..tasks.base import Batch, Task
from ..training.trials import undone

_MOVE = 1e-2  # of the second pass, in the parameter's own units


def preflight(
    model: nn.Module,
    adapters: AdapterSet,
    trained: Mapping[str, nn.Parameter],
    task: Task,
    batches: Iterable[Batch],
) -> list[str]:
    """Run the checks; returns what was found, in words.  Raises PreflightError naming everything that is wrong.

    model: called with a batch.   trained: everything that is to be trained, by name, heads included.
    batches: at least one; those after the first are asked for only where a parameter gets no gradient from it, as that
    of a class which is not in every batch.
    """
    some = iter(batches)
    batch: Batch | None = next(some)
    assert batch is not None
    found = [_starts_as_base(model, adapters, batch)]
    training = model.training
    model.train()
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    try:
        with undone(model):
            reached = _gradients(model, trained, task, batch)
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in trained.values():
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                    parameter.add_(noise, alpha=_MOVE)
            while batch is not None and len(reached) < len(trained):
                reached |= _gradients(model, trained, task, batch)
                batch = next(some, None)
            wrong = [name for name in trained if name not in reached]
            if wrong:
                raise PreflightError(
                    f"{len(wrong)} of {len(trained)} trained tensors get no gradient, so they would never "
                    f"learn: {_list(wrong)}. The model "
                    "reads these weights without calling the layer's forward, or the loss does not "
                    "depend on them. Leave them out of "
                    '`targets`, or reach them as parameters: Targets("*.attn").parameter("in_proj_weight")'
                )
            ours = {id(p) for p in trained.values()}
            leaking = [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in ours]
            if leaking:
                raise PreflightError(
                    f"{len(leaking)} frozen tensors got a gradient: {_list(leaking)}. Freeze them before training"
                )
    finally:
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(before[name])
                tensor.grad = None
        model.train(training)
    found.append(f"all {len(trained)} trained tensors get a finite gradient, the frozen ones none")
    return found


@torch.no_grad()
def _starts_as_base(model: nn.Module, adapters: AdapterSet, batch: Batch) -> str:
    model.eval()
    with_adapter = _tensors(model(batch))
    with adapters.off():
        base = _tensors(model(batch))
    model.train()
    if not all(torch.isfinite(tensor).all() for tensor in base):
        raise PreflightError(
            "the base model's output is not finite on the first batch: load it in float32, or check its weights"
        )
    if not all(torch.isfinite(tensor).all() for tensor in with_adapter):
        raise PreflightError("the adapted model's output is not finite on the first batch, before any step")
    size = max(1.0, *(float(tensor.abs().max()) for tensor in base))
    gap = max(float((a - b).abs().max()) for a, b in zip(with_adapter, base, strict=True))
    parts = [part for name in adapters.names for part in adapters.parts(name).values()]
    if all(part.starts_as_base for part in parts):
        tolerance = 1e-4 * size
        if gap > tolerance:
            raise PreflightError(
                f"a fresh adapter should leave the output as it was, and changes it by {gap:.1e} "
                f"(allowed: {tolerance:.1e})"
            )
        return f"the fresh adapter leaves the output as it was (largest change {gap:.0e})"
    return f"this method does not start as the base model: the fresh adapter changes the output by up to {gap:.1e}"


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in a model's outputs, however they are nested."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() and outputs.numel() else []
    inside = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple | list) else ()
    return [tensor for item in inside for tensor in _tensors(item)]


def _gradients(model: nn.Module, trained: Mapping[str, nn.Parameter], task: Task, batch: Batch) -> set[str]:
    """One forward and backward; the names that got a gradient that is not all zero.  Raises if one is not finite."""
    for parameter in trained.values():
        parameter.grad = None
    loss, count = task.loss(model(batch), batch)
    if not torch.isfinite(loss):
        raise PreflightError(
            f"the loss of the first batch is {float(loss)}: check the labels, or load the base in float32"
        )
    (loss / max(count, 1)).backward()  # type: ignore[no-untyped-call]
    gradients: dict[str, Tensor] = {name: p.grad for name, p in trained.items() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    if broken:
        raise PreflightError(
            f"{len(broken)} gradients of the first batch are not finite: {_list(broken)}. Load the base in float32"
        )
    return {name for name, gradient in gradients.items() if bool(gradient.any())}


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
