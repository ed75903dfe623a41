"""One adapter, to Hugging Face PEFT and back, and from there to us: the same outputs within 1e-5 of their size."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from smidgen import AdapterSet, attach
from smidgen.adapters import load
from smidgen.core.method import Method

Make = Callable[[], nn.Module]
Run = Callable[[nn.Module], Tensor]
TOLERANCE = 1e-5


def run_text(model: nn.Module) -> Tensor:
    """Logits of ten tokens; of the last ten positions where a prompt stands in front."""
    ids = torch.arange(1, 11)[None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out[:, -10:] if out.ndim == 3 else out


def run_on(x: Tensor) -> Run:
    """The output for one input."""
    return lambda model: model(x)


def from_peft(
    make: Make,
    config: Any,
    *,
    run: Run = run_text,
    tolerance: float = TOLERANCE,
    change: Callable[[nn.Module], None] | None = None,
) -> AdapterSet:
    """Train (so to speak) with HF PEFT, save, load here: the outputs agree.

    make: the same model, weights included, each time.   change: moves their adapter instead of adding noise.
    """
    theirs = peft.get_peft_model(make(), config)
    _moved(theirs) if change is None else change(theirs)
    theirs.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        model = make().eval()
        base = run(model)
        adapters = load(model, folder)
        _agree(run(model), run(theirs), base, tolerance)
    return adapters


def to_peft_and_back(
    make: Make,
    method: Method,
    *,
    run: Run = run_text,
    tolerance: float = TOLERANCE,
    says: Mapping[str, Any] | None = None,
) -> None:
    """Attach here, save, load with HF PEFT, save there, load here: the outputs agree all the way.

    says: what adapter_config.json has to hold.
    """
    model = make().eval()
    with torch.no_grad():
        base = run(model)
    adapters = attach(model, method, seed=0)
    _moved(model, own={id(p) for p in adapters.parameters()})
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours, back = Path(folder, "ours"), Path(folder, "back")
        expected = run(model)
        adapters.save(ours, task_type="CAUSAL_LM" if hasattr(model, "lm_head") else None)
        assert json.loads((ours / "smidgen.json").read_text())["not_peft"] is None
        written = json.loads((ours / "adapter_config.json").read_text())
        assert {name: written[name] for name in says or {}} == dict(says or {})
        theirs = peft.PeftModel.from_pretrained(make(), str(ours)).eval()
        _agree(run(theirs), expected, base, tolerance)
        theirs.save_pretrained(str(back))
        again = make().eval()
        load(again, back)
        _agree(run(again), expected, base, tolerance)


def gap(one: Tensor, other: Tensor) -> float:
    """norm(difference) / norm(other)."""
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def _moved(model: nn.Module, own: set[int] | None = None, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad if own is None else id(parameter) in own:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def _agree(one: Tensor, other: Tensor, base: Tensor, tolerance: float) -> None:
    assert one.shape == other.shape
    assert gap(other, base) > 1e-3, "the adapter does nothing, so agreement would say nothing"
    assert gap(one, other) <= tolerance, f"{gap(one, other):.1e} apart"
