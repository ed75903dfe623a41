"""Which cases a law is tried on: an argument `case` means all in fp32, `stored_case` in the other dtypes too."""

import functools

import pytest

from .cases import DTYPES, Case, cases


@functools.cache
def found(in_all_dtypes: bool) -> list[Case]:
    return list(cases(DTYPES if in_all_dtypes else DTYPES[:1]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, in_all_dtypes in (("case", False), ("stored_case", True)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, found(in_all_dtypes), ids=str)
