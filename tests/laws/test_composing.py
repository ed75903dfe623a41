"""Adapters together mean what the expression says."""

import pytest
import torch
from torch import nn

from smidgen import AdapterSet, Rows, Stack, Weighted
from smidgen.core.composition import Expression
from smidgen.core.errors import AttachError

from .bodies import ROWS
from .cases import Case, gap, merged_values, output_of


def output(case: Case, model: nn.Module, adapters: AdapterSet, expression: Expression) -> torch.Tensor:
    adapters.activate(expression)
    return case.run(model)


@torch.no_grad()
def test_none_is_the_base_model(case: Case):
    model, adapters = case.attached("a", "b")
    base = case.run(case.model())
    for nothing in (None, Stack(), Weighted(), Rows(*[None] * ROWS)):
        assert case.same(output(case, model, adapters, nothing), base)


@torch.no_grad()
def test_one_adapter_alone_is_the_same_in_every_arrangement(case: Case):
    model, adapters = case.attached("a", "b")
    alone = output(case, model, adapters, "a")
    assert torch.equal(output(case, model, adapters, Stack("a")), alone)
    if case.is_weightable:
        assert gap(output(case, model, adapters, Weighted(a=1)), alone) <= case.tolerance
        assert gap(output(case, model, adapters, Stack(None, Weighted(a=1, b=0))), alone) <= case.tolerance
    assert gap(output(case, model, adapters, Rows(*["a"] * ROWS)), alone) <= case.tolerance
    assert torch.equal(output(case, model, adapters, "a"), alone)


@torch.no_grad()
def test_an_adapter_does_the_same_whatever_its_name_and_company(typical_case: Case):
    model, adapters = typical_case.attached("a", "b")
    other, _ = typical_case.attached("training")  # nn.Module has an attribute of that name
    assert torch.equal(typical_case.run(other), output(typical_case, model, adapters, "a"))


@torch.no_grad()
def test_a_weighted_sum_is_the_base_plus_the_weighted_changes(case: Case):
    model, adapters = case.attached("a", "b")
    weighted = Weighted(a=0.5, b=2.0)
    if not case.is_weightable:
        with pytest.raises(AttachError, match="cannot be weighted"):
            adapters.activate(weighted)
        return
    sites = adapters.sites("a")
    if case.is_mergeable:
        a, b = merged_values(adapters, "a"), merged_values(adapters, "b")
        base = dict(case.model().named_parameters())
        values = {name: base[name] + 0.5 * (a[name] - base[name]) + 2.0 * (b[name] - base[name]) for name in a}
        expected = output_of(torch.func.functional_call(case.model(), values, (), case.batch(), tie_weights=False))
    elif (
        len(sites) == 1 and sites[0].parameter is None and sites[0].path in ("", "layer")
    ):  # whose output is the model's
        base = output(case, model, adapters, None)
        a, b = output(case, model, adapters, "a"), output(case, model, adapters, "b")
        expected = base + 0.5 * (a - base) + 2.0 * (b - base)
    else:
        return
    assert gap(output(case, model, adapters, weighted), expected) <= 2 * case.tolerance


@torch.no_grad()
def test_every_row_of_a_mixed_batch_is_as_if_run_alone(stored_case: Case):
    model, adapters = stored_case.attached("a", "b")
    composed = Weighted(a=0.5, b=2.0) if stored_case.is_weightable else "a"
    for rows in (Rows("a", None, "b"), Rows("b", "a", "b"), Rows(None, Stack("a", "b"), composed)):
        mixed = output(stored_case, model, adapters, rows)
        for row, expression in enumerate(rows.parts):
            adapters.activate(expression)
            alone = stored_case.run(model, slice(row, row + 1))
            assert gap(mixed[row : row + 1], alone) <= 2 * stored_case.tolerance, f"row {row} of {rows}"


def test_gradients_of_a_mixed_batch_are_those_of_its_rows(case: Case):
    model, adapters = case.attached("a", "b")
    weights = torch.randn(case.run(model).shape)
    with adapters.rows(["a", None, "b"]):
        (case.run(model) * weights).sum().backward()
    mixed = {name: [p.grad for p in adapters.parameters(name)] for name in ("a", "b")}
    model.zero_grad()
    for row, name in ((0, "a"), (2, "b")):
        adapters.activate(name)
        (case.run(model, slice(row, row + 1)) * weights[row]).sum().backward()
        alone = [p.grad for p in adapters.parameters(name)]
        size = max(float(g.norm()) for g in alone)  # some are zero but for rounding
        for ours, theirs in zip(mixed[name], alone, strict=True):
            assert float((ours - theirs).norm()) <= 1e-4 * size


@torch.no_grad()
def test_a_batch_of_another_length_is_refused_and_leaves_no_trace(typical_case: Case):
    case = typical_case
    model, adapters = case.attached("a", "b")
    before = case.run(model)
    with pytest.raises(AttachError, match="Rows names 2 rows"), adapters.rows(["a", "b"]):
        case.run(model)
    assert adapters.active == "a"
    assert torch.equal(case.run(model), before)
    with pytest.raises(AttachError, match='no adapter "bb"'), adapters.rows(["a", "bb", None]):
        pass
    assert torch.equal(case.run(model), before)
