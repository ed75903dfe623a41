"""A merged weight does what the adapter did, and what cannot be merged is refused untouched."""

import pytest
import torch

from smidgen import Stack, Weighted
from smidgen.core.adapter import AdditiveAdapter
from smidgen.core.errors import MergeError, NotMergeable

from .cases import Case, gap, merged_values, output_of
from .snapshots import base_tensors, everything, same


@torch.no_grad()
def test_merged_equals_running(mergeable_case: Case):
    case = mergeable_case
    for expression in ("a", Stack("a", "b"), Weighted(a=0.5, b=2.0)):
        model, adapters = case.attached("a", "b")
        before = base_tensors(model)
        adapters.activate(expression)
        running = case.run(model)
        report = adapters.merge(max_error=1.0)
        assert report.worst <= case.tolerance
        assert gap(case.run(model), running) <= case.tolerance, expression
        adapters.detach()
        assert [type(m) for m in model.modules()] == [type(m) for m in case.model().modules()]
        assert [(key, id(t), t.dtype) for key, t in base_tensors(model).items()] == [
            (key, id(t), t.dtype) for key, t in before.items()
        ]


@torch.no_grad()
def test_the_norm_of_the_change_is_that_of_its_entries(mergeable_case: Case):
    _, adapters = mergeable_case.attached()
    for part in adapters.parts("a").values():
        if isinstance(part, AdditiveAdapter) and (norm := part.weight_delta_norm()) is not None:
            assert norm == pytest.approx(float(part.weight_delta(slice(None)).double().norm()), rel=1e-4)


def test_what_cannot_be_merged_is_refused_and_nothing_changes(unmergeable_case: Case):
    case = unmergeable_case
    model, adapters = case.attached()
    before, output = everything(model), case.run(model)
    with pytest.raises((NotMergeable, MergeError), match=r"[Kk]eep"):
        adapters.merge("a")
    assert same(everything(model), before)
    assert torch.equal(case.run(model), output)
    assert adapters.active == "a"


@torch.no_grad()
def test_merged_agrees_with_functional_call_on_the_base(mergeable_case: Case):
    case = mergeable_case
    model, adapters = case.attached()
    values = merged_values(adapters, "a")
    expected = torch.func.functional_call(case.model(), values, (), case.batch(), tie_weights=False)
    assert gap(case.run(model), output_of(expected)) <= case.tolerance
