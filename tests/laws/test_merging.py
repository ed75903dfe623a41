"""A merged weight does what the adapter did, and what cannot be merged is refused untouched."""

import pytest
import torch

from smidgen import Stack, Weighted
from smidgen.core.composition import Expression
from smidgen.core.errors import MergeError, NotMergeable

from .cases import Case, gap, merged_values, output_of
from .test_attaching import everything, same

EXPRESSIONS: tuple[Expression, ...] = ("a", Stack("a", "b"), Weighted(a=0.5, b=2.0))


def expression_id(expression: Expression) -> str:
    return expression if isinstance(expression, str) else type(expression).__name__.lower()


@torch.no_grad()
@pytest.mark.parametrize("expression", EXPRESSIONS, ids=expression_id)
def test_merged_equals_running(stored_case: Case, expression: Expression):
    model, adapters = stored_case.attached("a", "b")
    if not stored_case.is_mergeable(adapters):
        return
    adapters.activate(expression)
    running = stored_case.run(model)
    report = adapters.merge(expression, max_error=1.0)
    assert report.worst <= stored_case.tolerance
    assert gap(stored_case.run(model), running) <= stored_case.tolerance
    adapters.detach()
    assert [(path, type(m)) for path, m in model.named_modules()] == [
        (path, type(m)) for path, m in stored_case.model().named_modules()
    ]
    assert model.state_dict().keys() == stored_case.model().state_dict().keys()


@torch.no_grad()
def test_a_weight_that_was_merged_into_keeps_its_dtype_and_is_the_same_tensor(stored_case: Case):
    model, adapters = stored_case.attached()
    if not stored_case.is_mergeable(adapters):
        return
    before = {name: (id(p), p.dtype) for name, p in stored_case.model().named_parameters()}
    identity = {id(p) for p in model.parameters()}
    adapters.merge("a", max_error=1.0)
    assert {name: p.dtype for name, p in model.named_parameters()} == {name: dtype for name, (_, dtype) in before.items()}
    assert {id(p) for p in model.parameters()} <= identity


def test_what_cannot_be_merged_is_refused_and_nothing_changes(case: Case):
    model, adapters = case.attached()
    if case.is_mergeable(adapters):
        return
    before, output = everything(model), case.run(model)
    with pytest.raises((NotMergeable, MergeError), match=r"[Kk]eep"):
        adapters.merge("a")
    assert same(everything(model), before)
    assert torch.equal(case.run(model), output)
    assert adapters.active == "a"


@torch.no_grad()
def test_merged_agrees_with_functional_call_on_the_base(stored_case: Case):
    model, adapters = stored_case.attached()
    if not stored_case.is_mergeable(adapters):
        return
    expected = torch.func.functional_call(
        stored_case.model(), merged_values(adapters, "a"), (), stored_case.batch(), tie_weights=False
    )
    assert gap(stored_case.run(model), output_of(expected)) <= stored_case.tolerance
