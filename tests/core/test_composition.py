"""Expressions: what they are as data, and what they mean for changes that can be computed by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smidgen import Rows, Stack, Weighted
from smidgen.core.adapter import Adapter, AdditiveAdapter, Call
from smidgen.core.composition import Expression, from_data, merged, names_in, plan_for, to_data, weighted_in
from smidgen.core.errors import AttachError
from smidgen.core.site import Site

SITE = Site.at("layer", nn.Linear(3, 3))


class Plus(AdditiveAdapter):
    """y + c"""

    def __init__(self, c: float) -> None:
        super().__init__(SITE)
        self.c = c

    def delta(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.c)

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return W, None if b is None else b + self.c


class Times(Adapter):
    """c y"""

    def __init__(self, c: float) -> None:
        super().__init__(SITE)
        self.c = c

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        return (self.c * y[0], *y[1:]) if isinstance(y, tuple) else self.c * y

    def merged(self, W: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        return self.c * W, None if b is None else self.c * b


ADAPTERS: dict[str, Adapter] = {"plus2": Plus(2), "plus5": Plus(5), "times3": Times(3), "times7": Times(7)}


def run(expression: Expression, rows: int = 1, base: float = 10) -> list[float]:
    """What becomes of a base output of 10 for each row."""
    plan = plan_for(expression, ADAPTERS.get)
    x = torch.zeros(rows, 1)
    out = x + base if plan is None else plan(lambda x: x + base, x)
    return out.flatten().tolist()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (None, 10),
        ("plus2", 12),
        ("times3", 30),
        ("elsewhere", 10),
        (Stack("plus2", "times3"), (10 + 2) * 3),
        (Stack("times3", "plus2"), 10 * 3 + 2),
        (Stack("plus2", "plus5"), 17),
        (Stack("plus2", "elsewhere", None, "plus5"), 17),
        (Stack("plus2", Stack("times3", "plus5")), (10 + 2) * 3 + 5),
        (Stack(Weighted(times3=0.5), "plus2"), 10 + 0.5 * 20 + 2),
        (Stack("plus2", "plus2"), 14),
        (Weighted(plus2=0.5, plus5=2), 10 + 0.5 * 2 + 2 * 5),
        (Weighted(times3=0.5, times7=-1), 10 + 0.5 * 20 - 60),
        (Weighted(plus2=0.5, times3=2), 10 + 0.5 * 2 + 2 * 20),
        (Weighted({"plus2": 3}), 16),
        (Weighted(elsewhere=3), 10),
        (Weighted(), 10),
        (Stack(), 10),
    ],
    ids=repr,
)
def test_an_expression_means_its_formula(expression: Expression, expected: float):
    assert run(expression) == [expected]
    _, b = merged(expression, ADAPTERS.get, torch.full((1, 1), 4.0), torch.tensor([10.0]), slice(None))
    assert b.tolist() == [expected]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (Rows("plus2", None, "times3"), [12, 10, 30]),
        (Rows("plus2", None, "plus5"), [12, 10, 15]),
        (Rows("plus5", "plus2", "plus5", None), [15, 12, 15, 10]),
        (Rows(Stack("plus2", "times3"), Weighted(plus2=0.5), "elsewhere"), [36, 11, 10]),
        (Rows("plus2", "plus2"), [12, 12]),
        (Rows(None, None), [10, 10]),
    ],
    ids=repr,
)
def test_every_row_has_its_own_expression(rows: Rows, expected: list[float]):
    assert run(rows, len(expected)) == expected


def test_the_base_runs_once_for_a_whole_batch_of_additive_changes():
    calls = []
    plan = plan_for(Rows("plus2", None, "plus5"), ADAPTERS.get)
    plan(lambda x: calls.append(len(x)) or x, torch.zeros(3, 1))
    assert calls == [3]


def test_each_row_may_have_been_repeated_on_the_way():
    assert run(Rows("plus2", "times3"), 6) == [12, 12, 12, 30, 30, 30]


def test_an_input_that_all_rows_share_is_given_to_each():
    assert run(Rows("plus2", "times3", None), 1) == [12, 30, 10]


@pytest.mark.parametrize("rows", [Rows("plus2", None), Rows("plus2", "times3"), Rows("plus2", "plus2")], ids=repr)
def test_another_number_of_rows_is_an_error(rows: Rows):
    with pytest.raises(AttachError, match="Rows names 2 rows, the batch has 3"):
        run(rows, 3)
    with pytest.raises(AttachError, match="the batch has 0"):
        run(rows, 0)


def test_of_a_module_with_several_outputs_the_first_is_weighted_and_the_others_stay():
    plan = plan_for(Weighted(times3=0.5, plus2=1), {"times3": Times(3), "plus2": Plus(2)}.get)
    hidden, rest = plan(lambda x: (x + 10, "weights"), torch.zeros(1))
    assert (hidden.tolist(), rest) == ([10 + 0.5 * 20 + 2], "weights")


def test_a_plan_knows_whether_it_is_additive():
    assert plan_for(Stack("plus2", Weighted(plus5=2)), ADAPTERS.get).additive
    assert not plan_for(Stack("plus2", "times3"), ADAPTERS.get).additive
    assert plan_for(Rows("plus2", None), ADAPTERS.get).additive
    assert not plan_for(Rows("plus2", "times3"), ADAPTERS.get).additive


def test_a_layer_that_has_none_of_the_adapters_costs_nothing():
    for expression in ("elsewhere", Stack("elsewhere"), Weighted(elsewhere=2), Rows("elsewhere", None)):
        assert plan_for(expression, ADAPTERS.get) is None


def test_an_output_keeps_its_dtype_whatever_the_changes_have():
    plan = plan_for(Weighted(plus2=0.5, plus5=0.5), ADAPTERS.get)
    assert plan(lambda x: x.half(), torch.zeros(1)).dtype == torch.float16


def test_rows_have_no_single_weight_and_stand_outermost():
    with pytest.raises(AttachError, match="no single weight"):
        merged(Rows("plus2", None), ADAPTERS.get, torch.zeros(1, 1), None, slice(None))
    with pytest.raises(AttachError, match="outermost"):
        Stack(Rows("plus2", None), "times3")
    with pytest.raises(AttachError, match="Rows inside Rows"):
        run(Rows("plus2", Rows("plus2", None)), 2)


EXPRESSIONS: list[Expression] = [
    None,
    "a",
    Stack("a", "b"),
    Weighted(a=0.5, b=-2.0),
    Rows("a", None, Stack("b", Weighted(a=1.5))),
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=repr)
def test_an_expression_is_data_and_comes_back(expression: Expression):
    assert from_data(to_data(expression)) == expression
    assert hash(expression) == hash(from_data(to_data(expression)))


@pytest.mark.parametrize(
    "data", [3, [], {}, {"stack": "a"}, {"weighted": [["a"]]}, {"parallel": ["a"]}, {"stack": [], "rows": []}]
)
def test_other_data_is_refused(data: Any):
    with pytest.raises(AttachError, match="is no composition"):
        from_data(data)


def test_names_are_found_wherever_they_stand():
    expression = Rows("a", None, Stack("b", Weighted(c=1.5)))
    assert list(names_in(expression)) == ["a", "b", "c"]
    assert list(weighted_in(expression)) == ["c"]
