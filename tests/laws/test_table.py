"""No method escapes the laws."""

from smidgen.core.method import methods

from .cases import EXAMPLES, cases


def test_every_method_has_an_example():
    missing = set(methods()) - {method for method, _ in EXAMPLES.values()}
    assert not missing, f"add a line to EXAMPLES in tests/laws/cases.py, so that the laws try it: {sorted(missing)}"


def test_every_example_acts_on_some_body():
    idle = set(EXAMPLES) - {case.example for case in cases()}
    assert not idle, (
        f"no body of tests/laws/bodies.py has a place for {sorted(idle)}: add one, or name its targets there"
    )
