"""Compiled without a graph break equals eager, also after switching."""

from collections.abc import Iterator

import pytest
import torch

from smidgen import Rows, Stack, Weighted
from smidgen.core.composition import Expression

from .cases import EXAMPLES, Case, cases, gap
from .test_training import loss_of

# Compiling takes long: one body for each method, the first that it accepts, and those that show other kinds of site.
FIRST = ("linear", "layer_norm", "multihead_attention", "llama", "batch_norm", "encoder_layer", "conv2d")
MORE = (
    "lora-conv2d",
    "lora-embedding",
    "lora-experts",
    "lora-multihead_attention",
    "lora-llama",
    "lora-linear_nf4",
    "dora-linear_int8",
)
SWITCHES: tuple[Expression, ...] = ("b", Weighted(a=0.5, b=2.0), Stack("a", "b"), Rows("a", None, "b"), None, "a")


def compiled_cases() -> list[Case]:
    found = {str(case): case for case in cases()}
    first = [next(found[key] for body in FIRST if (key := f"{example}-{body}") in found) for example in EXAMPLES]
    return first + [found[key] for key in MORE]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def lora_on_linear() -> Case:
    return next(case for case in cases() if str(case) == "lora-linear")


@pytest.mark.parametrize("compiled_case", compiled_cases(), ids=str)
def test_compiled_without_a_graph_break_equals_eager_also_after_switching(compiled_case: Case):
    case = compiled_case
    model, adapters = case.attached("a", "b")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for expression in ("a", *SWITCHES):
        if isinstance(expression, Weighted) and not case.is_weightable:
            continue
        adapters.activate(expression)
        if isinstance(expression, Rows) and not adapters._all_by_row(expression):
            continue  # one call of the model for each group
        assert gap(case.run(compiled), case.run(model)) <= case.tolerance, expression


def test_default_compilation_trains_the_same(lora_on_linear: Case):
    model, adapters = lora_on_linear.attached()
    loss_of(lora_on_linear.run(model)).backward()
    eager = [p.grad for p in adapters.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    loss_of(lora_on_linear.run(compiled)).backward()
    for p, gradient in zip(adapters.parameters(), eager, strict=True):
        assert gap(p.grad, gradient) <= lora_on_linear.tolerance


@torch.no_grad()
@pytest.mark.parametrize("body", ["linear", "multihead_attention"])
def test_an_exported_model_does_the_same(body: str):
    case = next(case for case in cases() if str(case) == f"lora-{body}")
    model, _ = case.attached()
    exported = torch.export.export(model, (), case.batch()).module()
    assert gap(case.run(exported), case.run(model)) <= case.tolerance
