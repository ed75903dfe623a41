"""What single benchmarks count and compare."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")


def test_weights_are_counted_with_their_scales():
    from quantised import in_format, weights_bytes

    model = in_format(nn.Sequential(nn.Linear(64, 32, bias=False)), "int8")
    assert 64 * 32 < weights_bytes(model) < 1.5 * 64 * 32
    weight = nn.Parameter(torch.zeros(8), requires_grad=False)
    weight.quant_state = type("QuantState", (), {})()  # as bitsandbytes has it
    weight.quant_state.absmax = torch.zeros(4)
    holder = nn.Module()
    holder.weight = weight
    assert weights_bytes(holder) == 4 * (8 + 4)


def test_methods_far_apart_stand_with_the_largest_gain_first():
    from common import Spread
    from methods import far_apart

    def row(name: str, ours: float, theirs: float | None) -> list:
        said = ["no such method"] if theirs is None else [Spread(theirs, theirs, theirs, 1)]
        return [name, "", "", Spread(ours, ours, ours, 1), *said]

    rows = [row("alike", 1.0, 1.05), row("slower", 2.0, 1.0), row("alone", 1.0, None), row("faster", 1.0, 3.0)]
    assert [each[0] for each in far_apart(rows)] == ["faster", "slower"]


def test_times_ours_is_of_the_better_of_both_settings():
    from common import Spread
    from handling import BEST, OURS, THEIRS, row

    figures = {tool: Spread(s, s, s, 1) for tool, s in ((OURS, 1.0), (THEIRS, 6.0), (BEST, 4.0))}
    assert row("load", figures)[-1] == 4
    del figures[BEST]
    assert row("import", figures)[3:] == [None, 6]


@pytest.mark.parametrize(("dtype", "names"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_rows_are_beside_hf_peft_at_its_best_where_that_differs(dtype, names):
    from rows import OURS, Layer, Twins

    twins = Twins(Layer, dtype, count=2)
    x = torch.randn(2, 1, 2048, dtype=dtype)
    with torch.no_grad():
        for prepare in twins.runs(["a0", "a1"], x, repeats=1).values():
            prepare()()
    assert len(twins.runs(["a0", None], x, repeats=1)) == 1 + names
    dtypes = {p.dtype for name, model in twins.theirs.items() if name != "HF PEFT" for p in model.parameters()}
    assert dtypes <= {torch.bfloat16}
    assert OURS in twins.runs(["a0", None], x, repeats=1)
